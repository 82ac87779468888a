"""Hidden MSE: how far a block moves the stream, length included, from one forward pass.

    score = mean over tokens and channels of (y - x)^2 / the same mean of y^2        x, y = stream before and after

Source: the alternative to block influence in the code of ILD (arXiv 2511.05085), which compares raw states; dividing by
the output's mean square makes blocks comparable, since the stream grows with depth. Position 0 is left out, whose norm
would outweigh all others. Unlike a cosine it sees a block that only stretches or shrinks the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from iskd.importance.base import WindowImportance, block_rows
from iskd.models import scoring


class HiddenMSE(WindowImportance):
    """Mean squared distance of a block's input and output in units of the output's mean square; at least 0.

    `published`: the plain mean square, position 0 in it and the last block's output after the final norm, as in the
    code of ILD.

    Source: the code of ILD (arXiv 2511.05085); divided by the output's size, ours
    Needs: calibration tokens (`run.score_tokens`)
    Costs: one forward pass, no head
    Measured: not measured
    """

    def __init__(self, *, published: bool = False) -> None:
        self.published = published

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, W] of the student's blocks on calibration windows [B, T]."""
        with scoring(student):
            measure = _distance if self.published else _relative_distance
            return block_rows(student, batches, measure, published=self.published)


def _distance(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).square().mean((1, 2))


def _relative_distance(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).square().mean((1, 2)) / after.square().mean((1, 2))
