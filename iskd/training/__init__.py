"""The stage loop: decide, edit, train, measure, keep or roll back, save.

`step` is one training step, `state` where a run stands, `profile` where its time goes.

Imports: system, plan, models, losses, teacher, data, blocks, evaluation, refits, importance, schedules,
schedules.budget, report, export, training.step, training.state, training.metrics.
"""

from __future__ import annotations

from iskd.training.parts import Parts, Result
from iskd.training.restart import StartAgain
from iskd.training.runner import run

__all__ = ["Parts", "Result", "StartAgain", "run"]
