"""Block influence: how much a block turns the stream, from one forward pass.

    score = 1 - mean over tokens of cos(x_t, y_t)        x, y = stream before and after the block

Source: ShortGPT (arXiv 2403.03853, section 3.1). Position 0 is left out, and the last state is that before the final
norm (ours; with `published` as in the authors' code). Blind to blocks that build or undo the attention sink: see
`bi_veto`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from iskd.importance.base import WindowImportance, cosine_rows
from iskd.models import scoring


class BlockInfluence(WindowImportance):
    """1 - mean cosine between a block's input and output, position 0 left out; in [0, 2].

    `published`: position 0 counts and the last block's output is read after the final norm, as in the code of ILD,
    which makes that block look far more important; the baselines `shortgpt` and `iterative_bi` take it so.

    Source: ShortGPT (arXiv 2403.03853, section 3.1)
    Needs: calibration tokens (`run.score_tokens`)
    Costs: one forward pass, no head; 0.98 CPU s for 256 tokens through SmolLM2-135M (benchmarks/leave_one_out.md)
    What for block_influence_paper: 1 - mean cosine between a block's input and output, position 0 and the final norm
        in, as in the authors' code
    Measured for block_influence_paper: not measured
    Measured: ShortGPT, healed: KL 0.53 at 23 layers of 30 (experiments/ild-smollm2/README.md); KL 0.72
        at 20 layers of 30 (experiments/ild-smollm2/README.md)
    """

    def __init__(self, *, published: bool = False) -> None:
        self.published = published

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, W] of the student's blocks on calibration windows [B, T]."""
        with scoring(student):
            return cosine_rows(student, batches, published=self.published)
