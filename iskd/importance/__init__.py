"""[shelf] One score per layer, higher = keep; rows of scores by calibration window, and how sure they are.

Imports: models, plan, system, data, evaluation.tasks, evaluation.
"""

from __future__ import annotations

from iskd.importance.base import AttentionImportance, WindowImportance, by_layer, refuse_not_finite, rows_of
from iskd.importance.fixed import Fixed
from iskd.importance.noise import LayerScore, layer_scores, within_noise

__all__ = [
    "AttentionImportance",
    "Fixed",
    "LayerScore",
    "WindowImportance",
    "by_layer",
    "layer_scores",
    "refuse_not_finite",
    "rows_of",
    "within_noise",
]
