"""Causal linear attention (arXiv 2006.16236): softmax(q k^T) becomes phi(q) phi(k)^T, so a state replaces the cache.

    S_t = S_{t-1} + phi(k_t) v_t^T        o_t = phi(q_t)^T S_t / (phi(q_t)^T sum_{s <= t} phi(k_s) + eps)

or, without the normaliser, o_t = K^-1/2 phi(q_t)^T S_t. All weights are inherited (arXiv 2504.14366): q, k, v and o
with their biases, and the q and k norms of Qwen3 and Phi, which come before phi. Rotary positions are dropped, as
there: order then reaches the mixer through causality and through what the stream carries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.arch import Stack
from iskd.hosting import CacheSlot, kept
from iskd.mixers.base import Projections, recurrence

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "identity": lambda x: x,
}


class LinearAttention(nn.Module):
    """Linear attention over inherited projections. Its state is [B, G, K, V + 1] (V without the normaliser), fp32.

    Args:
        projections: copies of the attention's projections.
        feature_map: phi, a name of `FEATURE_MAPS`.
        normalize: divide by the sum of the weights; needs a map without negative values.
        chunk: tokens per chunk; changes the speed, not the result.
        eps: added to the normaliser.

    Raises:
        ValueError: an unknown map, a map that cannot be normalised, a chunk below 1 or an eps that is not positive.
    """

    def __init__(
        self,
        projections: Projections,
        *,
        feature_map: str = "elu1",
        normalize: bool = True,
        chunk: int = 64,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"mixer.feature_map={feature_map!r}: choose one of {', '.join(FEATURE_MAPS)}")
        if normalize and feature_map == "identity":
            raise ValueError(
                "mixer.normalize=true needs weights that are not negative; "
                "choose mixer.feature_map=elu1 or relu, or mixer.normalize=false"
            )
        if chunk < 1 or eps <= 0:
            raise ValueError(f"mixer.chunk must be at least 1 and mixer.eps positive, got {chunk} and {eps}")
        self.projections = projections
        self.feature_map, self.normalize, self.chunk, self.eps = feature_map, normalize, chunk, eps

    @classmethod
    def from_attention(
        cls,
        old_attn: nn.Module,
        stack: Stack,
        *,
        feature_map: str = "elu1",
        normalize: bool = True,
        chunk: int = 64,
        eps: float = 1e-6,
    ) -> LinearAttention:
        """Inherit every weight of `old_attn`; arguments as in the class."""
        projections = Projections.from_attention(old_attn, stack)
        return cls(projections, feature_map=feature_map, normalize=normalize, chunk=chunk, eps=eps)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CacheSlot | None = None,
    ) -> Tensor:
        """Mix the normalised stream [B, T, D]; tokens that the mask hides do not enter the state."""
        q, k, v = self.projections.split(x_BTD)
        phi = FEATURE_MAPS[self.feature_map]
        # a sum over the whole past: bf16 would stop counting at 256 tokens
        wide = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            seen = kept(mask, x_BTD.shape[1])
            keys, values = phi(k.to(wide)), v.to(wide)
            if seen is not None:
                keys = keys * seen[..., None, None]
            if self.normalize:
                values = F.pad(values, (0, 1), value=1.0)  # the sum of the weights is what mixing ones gives
            past = None if cache is None else cache.state()
            o, state = recurrence(phi(q.to(wide)), keys, values, None if past is None else past[0], chunk=self.chunk)
            if cache is not None:
                cache.keep((state,), tokens=x_BTD.shape[1])
            o = o[..., :-1] / (o[..., -1:] + self.eps) if self.normalize else o * k.shape[-1] ** -0.5
        return self.projections.out(o.to(v.dtype))
