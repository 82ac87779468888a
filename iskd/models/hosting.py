"""How compact blocks and mixers live inside a host: call signature, mask, KV cache, small decoders of its family.

`HostedBlock` gives a compact block the call signature of the block it replaces and `HostedMixer` a mixer that of the
attention it replaces, so that their authors see `forward(h_BTD, *, mask, positions, cache)` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from iskd.models.cache import CacheSlot
from iskd.models.families import Family
from iskd.models.packing import ONE_TEXT


class HostedBlock(nn.Module):
    """Runs a compact block where the host model calls one of its own blocks."""

    hosts_layers = True  # its layer_idx is the host's cache slot; layers inside are numbered on their own

    def __init__(self, block: nn.Module, family: Family) -> None:
        super().__init__()
        self.block = block
        self.family = family
        self.layer_idx = 0

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Translate the host's call and return the new stream [B, T, D]."""
        kwargs.update(zip(self.family.positional, args, strict=False))
        cache = kwargs.get(self.family.cache_key)
        out: Tensor = self.block(
            hidden_states,
            mask=kwargs.get("attention_mask"),
            positions=kwargs.get("position_ids"),
            cache=None if cache is None else CacheSlot(cache, self.layer_idx),
        )
        return out


class HostedMixer(nn.Module):
    """Runs a mixer where a block of the host calls its attention."""

    def __init__(self, mixer: nn.Module, family: Family) -> None:
        super().__init__()
        self.mixer = mixer
        self.family = family
        self.layer_idx = 0

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Translate the block's call: the mixed stream [B, T, D], and no attention weights."""
        cache = kwargs.get(self.family.cache_key)
        out: Tensor = self.mixer(
            hidden_states,
            mask=kwargs.get("attention_mask"),
            positions=positions_of(kwargs),
            cache=None if cache is None else CacheSlot(cache, self.layer_idx),
        )
        return out, None


def positions_of(call: Mapping[str, Any]) -> Tensor | None:
    """The positions that a mixer is to look at, [B, T] or [1, T]; None = each window is one text, from its start."""
    return None if call.get(ONE_TEXT) else call.get("position_ids")


def kept(mask: Any, tokens: int) -> Tensor | None:
    """Which of the last `tokens` tokens are real and not padding, bool [B, tokens]; None = all.

    Read off a host's attention mask: a real token sees itself, padding does not; that holds under a sliding window too.

    Args:
        mask: None, [B, S] (nonzero = real), or [B, 1, tokens, S], bool (True = sees) or additive (0 = sees), where S
            counts past and new tokens.
        tokens: new tokens.

    Raises:
        ValueError: a mask of any other kind.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a mixer cannot read the attention mask {shape}; use attn_implementation='sdpa', 'eager' or "
            "'flash_attention_2'"
        )
    if mask.dim() == 2:
        return mask[:, -tokens:] != 0
    diagonal = mask[:, 0, :, -tokens:].diagonal(dim1=1, dim2=2)
    return diagonal if diagonal.dtype == torch.bool else diagonal == 0
