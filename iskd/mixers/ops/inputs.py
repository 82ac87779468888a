"""The tensors of one recurrence, which all its forms take as one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Recurrence:
    """What `iskd.mixers.ops.recurrence` mixes, and how. Sizes as there.

    Attributes:
        q: queries [B, T, H, K].
        k: keys [B, T, G, K]. With the delta rule of length 1 and beta in [0, 2], or the state diverges.
        v: values [B, T, G, V].
        g: log decay, at most 0: [B, T, G] per head or [B, T, G, K] per key feature; None = no decay.
        beta: strength of the delta rule [B, T, G]; None = plain sums.
        scale: factor of the outputs.
        bonus: weight u of a token's own key [G, K]; None = outputs are read after the write.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None
    scale: float = 1.0
    bonus: Tensor | None = None
