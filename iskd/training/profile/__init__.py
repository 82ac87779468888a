"""Where the time of a training step goes: a few steps of a run, measured by span and by operator.

Imports: system, plan, models, losses, teacher, refits, data, schedules, report, export, training.step, training.state,
training.metrics, training.
"""

from __future__ import annotations

from iskd.training.profile.profile import profile_table, write_profile
from iskd.training.profile.run_profile import profile_parts

__all__ = ["profile_parts", "profile_table", "write_profile"]
