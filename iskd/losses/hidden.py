"""Match the student's hidden states to the teacher's, token by token, at layers that both have.

    mse          mean_d (s_d - t_d)^2                               ILD, arXiv 2511.05085
    normalized   mean_d (s_d - t_d)^2 / mean_d t_d^2
    cosine       1 - <s, t> / (|s| |t|)

In many decoders the first position is an attention sink whose state is thousands of times longer than the others
(Massive Activations, arXiv 2402.17762). Under "mse" that one token is the whole loss; under "normalized" and "cosine"
every token counts alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.models import Signals, at_least_fp32

KINDS = ("mse", "normalized", "cosine")
NAMED_LAYERS = ("last", "all", "edited", "stage")


class HiddenMatch:
    """Distance between hidden states before the final norm, averaged over layers.

    Args:
        kind: "mse", "normalized" or "cosine"; see the module's formulas.
        layers: Which states capture keeps, in the teacher's numbering: "last", "all", "edited" (every layer edited so
            far; for a removed one, the survivor below it), "stage" (the same for the edits of this stage alone) or a
            list of layers. Before any edit "edited" and "stage" are "last". A list or "last" also selects among the
            states that another term asked for; the others average over every layer that both signals hold.

    Raises:
        ValueError: Unknown kind, unknown name of layers, or an empty list.

    What for hidden: mean squared distance of hidden states before the final norm, averaged over layers;
        `kind=normalized` in units of the teacher's
    What for hidden_cosine: cosine distance of hidden states before the final norm, averaged over layers
    Source: ILD (arXiv 2511.05085); `normalized` is ours
    Source for hidden_cosine: ours, against massive activations (arXiv 2402.17762)
    Needs: the teacher's hidden states at layers that both have
    Costs: states [B, T, D] of the layers compared, no logits
    Measured for hidden: `normalized`, beside KL in ILD: KL 0.327 and 0.320 at 26 layers of 30
        (experiments/ild-smollm2/README.md)
    Measured for hidden_cosine: not measured
    """

    needs: frozenset[str] = frozenset({"hidden"})
    uses_teacher: bool = True

    def __init__(self, kind: str = "mse", layers: str | Iterable[int] = "last") -> None:
        if kind not in KINDS:
            raise ValueError(f"HiddenMatch kind must be one of {list(KINDS)}, got {kind!r}")
        if isinstance(layers, str) and layers not in NAMED_LAYERS:
            raise ValueError(f"HiddenMatch layers must be one of {list(NAMED_LAYERS)} or a list, got {layers!r}")
        self.kind = kind
        self.layers: str | list[int] = layers if isinstance(layers, str) else [int(layer) for layer in layers]
        if not self.layers:
            raise ValueError("HiddenMatch layers is an empty list; name a layer, 'last', 'all' or 'edited'")
        self.sizes = "" if kind == "cosine" or layers == "last" else "stream"

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Distance of the labels' shape, mean over layers; no gradient reaches the teacher.

        Raises:
            ValueError: No layer asked for is present on both sides, or the widths differ.
        """
        values = [self._distance(student.hidden[i], teacher.hidden[i].detach()) for i in self._select(student, teacher)]
        return torch.stack(values).mean(0)

    def _select(self, student: Signals, teacher: Signals) -> list[int]:
        common = sorted(student.hidden.keys() & teacher.hidden.keys())
        if isinstance(self.layers, list):
            chosen = [layer for layer in common if layer in self.layers]
        else:
            chosen = common[-1:] if self.layers == "last" else common
        if not chosen:
            raise ValueError(
                f"HiddenMatch(kind={self.kind!r}, layers={self.layers!r}) has no layer to compare: the student exposes "
                f"{sorted(student.hidden)}, the teacher {sorted(teacher.hidden)}; ask for layers that both have"
            )
        return chosen

    def _distance(self, student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
        if student_BTD.shape != teacher_BTD.shape:
            raise ValueError(
                f"HiddenMatch needs equal shapes: student {list(student_BTD.shape)}, teacher {list(teacher_BTD.shape)}"
            )
        s_BTD, t_BTD = at_least_fp32(student_BTD), at_least_fp32(teacher_BTD)
        if self.kind == "cosine":
            return 1 - F.cosine_similarity(s_BTD, t_BTD, dim=-1)
        mse_BT = (s_BTD - t_BTD).square().mean(-1)
        if self.kind == "mse":
            return mse_BT
        return mse_BT / t_BTD.square().mean(-1).clamp_min(torch.finfo(t_BTD.dtype).tiny)
