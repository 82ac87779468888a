"""Ablation: what is lost when a block is left out (ILD, arXiv 2511.05085, scores tasks; here the KL to the teacher)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from iskd.importance.base import ablation_kl, scoring


class Ablation:
    """KL(teacher || student without the block) in nats per token, on every `stride`-th position."""

    def __init__(self, stride: int = 4) -> None:
        if stride < 1:
            raise ValueError(f"importance.stride must be at least 1, got {stride}")
        self.stride = stride

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L] of the student's blocks on calibration windows [B, T]."""
        with scoring(student, teacher):
            return ablation_kl(student, teacher, batches, self.stride)
