"""[shelf] Refits: survivors re-solved after an edit, on calibration text, before any training token.

Imports: system, plan, models, teacher, blocks, evaluation.
"""

from __future__ import annotations

from iskd.refits.base import Refit, RefitTask
from iskd.refits.carrying_out import check_refits, check_sizes, check_used, refit_survivors
from iskd.refits.reading import Text, divided, for_stage, training_tokens

__all__ = [
    "Refit",
    "RefitTask",
    "Text",
    "check_refits",
    "check_sizes",
    "check_used",
    "divided",
    "for_stage",
    "refit_survivors",
    "training_tokens",
]
