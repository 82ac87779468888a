"""The parts of a run from its config: model, text, schedule, budget, folder, and what is asked for at its end.

Imports: system, plan, data, models, blocks, losses, refits, schedules, schedules.budget, importance, evaluation,
teacher, report, export, training, training.state, training.metrics, training.profile, commands.line, commands.values.
"""

from __future__ import annotations

from iskd.commands.build.making import parts, plan_without
from iskd.commands.build.model import teacher_of
from iskd.commands.build.schedule import importance_of, read_with
from iskd.commands.build.text import source_of, text_data
from iskd.commands.build.within_budget import asked_of

__all__ = ["asked_of", "importance_of", "parts", "plan_without", "read_with", "source_of", "teacher_of", "text_data"]
