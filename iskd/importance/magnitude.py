"""Magnitude: how large a block's weights are. Reads no text.

    l1: sum |w| / N        l2: sqrt(sum w^2 / N)        over the N parameters of the block's matrices

Source: filter norms of Li et al. (arXiv 1608.08710, section 3.1), applied to whole blocks in Shortened LLaMA (arXiv
2402.02834, section 3), which takes sums; per parameter, a compact block is not cheap only because it is small.
Norm weights and biases are left out. Weak on its own: a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.importance.base import WindowImportance
from iskd.models import Stack
from iskd.models.sharding import whole


class Magnitude(WindowImportance):
    """Mean absolute weight (`norm=l1`) or root mean square weight (`norm=l2`) of a block's matrices.

    Source: Li et al. (arXiv 1608.08710); of blocks: Shortened LLaMA (arXiv 2402.02834)
    Needs: nothing
    Costs: one look at the weights
    Measured: not measured
    """

    def __init__(self, norm: str = "l1") -> None:
        if norm not in ("l1", "l2"):
            raise ValueError(f"importance.norm={norm!r}: choose 'l1' or 'l2'")
        self.power = 1 if norm == "l1" else 2

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, 1] of the student's blocks; the batches are not read. A block without matrices scores 0."""
        return torch.stack([self._score(block) for block in Stack(student).layers])[:, None]

    @torch.no_grad()
    def _score(self, block: nn.Module) -> Tensor:
        matrices = [p for p in block.parameters() if p.ndim > 1]
        total = torch.zeros(())
        for matrix in matrices:
            total += whole(matrix.float().abs().pow(self.power).sum()).cpu()
        return (total / max(1, sum(matrix.numel() for matrix in matrices))) ** (1 / self.power)
