"""[shelf] Which stage comes next, as a pure function of what is finished.

`stages_ahead` tells all stages ahead, before the first one runs.

Imports: plan.
"""

from __future__ import annotations

from iskd.schedules.base import Choice, History, Schedule, next_stage, next_stages
from iskd.schedules.edits import ConvertTo, EditKind
from iskd.schedules.stages_ahead import forecast, planned_steps, stage_steps

__all__ = [
    "Choice",
    "ConvertTo",
    "EditKind",
    "History",
    "Schedule",
    "forecast",
    "next_stage",
    "next_stages",
    "planned_steps",
    "stage_steps",
]
