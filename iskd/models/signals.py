"""Signals: what a forward pass exposes to losses and metrics, as a plain container that capture fills.

Shape legend: B windows, T tokens per window, N (or n) tokens of one chunk, D width, V vocabulary, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class Signals:
    """What one forward pass exposes to losses.

    Leading dims are [B, T] for a batch and [N] for a chunk of tokens. Layers are numbered as in the teacher,
    so that entry 17 of a student and of its teacher mean the same depth even after layer 3 was removed.

    Attributes:
        labels: [B, T] int64 next-token ids, already shifted (labels[t] is the target of position t); -100 = ignored.
        logits: [..., V]; present only inside a vocabulary chunk, because [B, T, V] is never materialised.
        last_hidden: [B, T, D] after the final norm, the input of the head.
        divisor: What the state after the final norm was divided by to be the input of the head (Granite; else 1).
        hidden: State after layer i, before the final norm, each [B, T, D].
    """

    labels: Tensor
    logits: Tensor | None = None
    last_hidden: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    divisor: float = 1.0


def next_tokens(input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
    """Labels [B, T] of windows [B, T]: the next token, ignored at the last position.

    Args:
        input_ids: the windows.
        targets: which tokens [B, T] are to be predicted, true or false; None = all. The label of a position is the
            token behind it, so it is that one's entry that counts.
    """
    known = input_ids if targets is None else input_ids.masked_fill(~targets, IGNORE)
    return torch.cat([known[:, 1:], torch.full_like(input_ids[:, :1], IGNORE)], dim=1)
