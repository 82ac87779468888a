"""Tasks, text, quality and cost of a model, beside its teacher on the same items.

Imports: system, plan, models, teacher, data/files, data, evaluation.tasks.
"""

from __future__ import annotations

from iskd.evaluation.evaluator import Asking, evaluate
from iskd.evaluation.quality import measure_quality
from iskd.evaluation.questions import EvalSpec
from iskd.evaluation.results import Efficiency, Evaluation, Interval
from iskd.evaluation.tasks import TASKS
from iskd.evaluation.text import refuse_training_text

__all__ = [
    "TASKS",
    "Asking",
    "Efficiency",
    "EvalSpec",
    "Evaluation",
    "Interval",
    "evaluate",
    "measure_quality",
    "refuse_training_text",
]
