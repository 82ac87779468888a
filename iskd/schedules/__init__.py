"""[shelf] Which stage comes next, as a pure function of what is finished.

`stages_ahead` tells all stages ahead, before the first one runs.

Imports: plan.
"""

from __future__ import annotations

from iskd.schedules.base import Choice, History, Schedule, next_stage
from iskd.schedules.edits import EVERY, ConvertTo, EditKind
from iskd.schedules.mixed import of_stage, turn_of
from iskd.schedules.stages_ahead import forecast, planned_steps, stage_steps

__all__ = [
    "EVERY",
    "Choice",
    "ConvertTo",
    "EditKind",
    "History",
    "Schedule",
    "forecast",
    "next_stage",
    "of_stage",
    "planned_steps",
    "stage_steps",
    "turn_of",
]
