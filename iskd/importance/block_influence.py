"""Block influence: how much a block turns the stream, from one forward pass.

Source: ShortGPT (arXiv 2403.03853, section 3.1). Blind to blocks that build or undo the attention sink: see `bi_veto`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from iskd.importance.base import cosine_influence, scoring


class BlockInfluence:
    """1 - mean cosine between a block's input and output, position 0 left out; in [0, 2]."""

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L] of the student's blocks on calibration windows [B, T]."""
        with scoring(student):
            return cosine_influence(student, batches)
