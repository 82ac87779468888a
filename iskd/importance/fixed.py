"""Fixed scores: an order known from elsewhere, such as a paper's list or the scores of another run.

order: score = place in the list, 0 = first to go        scores: as given, higher = keep
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.importance.base import WindowImportance
from iskd.models import Stack


class Fixed(WindowImportance):
    """Scores from the configuration; blocks are counted from 0 in the student's stack when it is scored.

    Args:
        scores: one per block, higher = keep.
        order: every block once, the first to go first.

    Raises:
        ValueError: not exactly one of the two is given, or `order` names a block twice or leaves one out.

    Source: none: scores or an order of your own
    Needs: `importance.scores` or `importance.order`
    Costs: nothing
    Measured: not measured
    """

    def __init__(self, scores: Sequence[float] | None = None, order: Sequence[int] | None = None) -> None:
        if (scores is None) == (order is None):
            raise ValueError(
                f"importance=fixed takes either importance.scores or importance.order, got {scores} and {order}"
            )
        self.key = "order" if scores is None else "scores"
        self.values: list[float] = list(scores or order or ())
        if order is not None and sorted(order) != list(range(len(order))):
            raise ValueError(
                f"importance.order must name each block from 0 to {len(order) - 1} once, the first to go first; "
                f"got {list(order)}"
            )

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, 1]; the batches are not read.

        Raises:
            ValueError: the list is not as long as the student's stack.
        """
        blocks = len(Stack(student).layers)
        if len(self.values) != blocks:
            raise ValueError(
                f"importance.{self.key} holds {len(self.values)} entries, but the student has {blocks} blocks; "
                "give one per block, and schedule.rescore=false where blocks are removed on the way"
            )
        values = torch.tensor(self.values, dtype=torch.float32)
        # the inverse of a permutation: place of each block in the order
        return (values.argsort().float() if self.key == "order" else values)[:, None]
