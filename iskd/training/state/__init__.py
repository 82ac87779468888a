"""Where a run stands, and its checkpoints.

Position, weights, optimizer state and random numbers, resumable at any step while the architecture changes.

Imports: system, plan, models, teacher, export, training.step.
"""

from __future__ import annotations

from iskd.training.state.rolling_back import back_to
from iskd.training.state.run_state import RunState, Status
from iskd.training.state.saver import Saver
from iskd.training.state.students import StudentKeeper, gathered, stored_in

__all__ = ["RunState", "Saver", "Status", "StudentKeeper", "back_to", "gathered", "stored_in"]
