"""Sliding-window softmax attention with linear attention behind it (LoLCATs, arXiv 2410.10254, section 3).

    o_t = (gamma_h sum_{t-w < s <= t} exp(q_t^T k_s / sqrt(K) - c_t) v_s + phi(q_t)^T S_{t-w}) / (the same with v = 1)
    S_t = S_{t-1} + phi(k_t) v_t^T        c_t = the largest q_t^T k_s / sqrt(K) in the window        y_t = W_o o_t

One normaliser for both: a token moves from the window into the state as it leaves the window. phi is Hedgehog (learned,
one map for q and one for k), elu + 1 or relu. gamma = sigmoid(window_gate) per query head.

Copied: q, k, v and o, key-value heads grouped, and rotary positions, which come before phi. Fresh: the feature maps,
the identity before their softmax, and gamma. Up to w tokens gamma cancels and the mixer is the teacher's attention
itself, whatever the maps are. Behind the window untrained maps spread their weight too evenly, which a large gamma
limits: it starts at 0.9 here, at 0.1 in the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import Attention, Basics, Context, RecurrentMixer, Streams
from iskd.mixers.modules import check_count
from iskd.mixers.modules.features import FIXED, SIGNED, Hedgehog
from iskd.mixers.modules.limits import MAX_TOKENS
from iskd.mixers.ops.window import near, pairs, unnormalised
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAPS = ("hedgehog", *(name for name in FIXED if name not in SIGNED))
EPS = 1e-12  # what a hidden token, which sees nothing, is divided by


class Sliding(RecurrentMixer):
    """Sliding-window softmax with linear attention behind it, over inherited projections.

    Its state is the sum [B, G, K', V + 1] over the tokens behind the window, fp32, and of the window's tokens the keys
    [B, w, G, K], the values [B, w, G, V] and which of them count [B, w]. Hedgehog has K' = 2K features.

    Args:
        attention: what it is made from.
        window: tokens w that softmax sees, the present one included.
        feature_map: phi, one of `MAPS`.
        gamma: where the weight of the window starts, in (0, 1).
        rotary, conv, **common: as in `RecurrentMixer`.

    Raises:
        ValueError: a window out of its range (`iskd.mixers.modules.limits`), an unknown map, or a gamma outside (0, 1).

    Source: LoLCATs (arXiv 2410.10254)
    Needs: attention's q, k, v and o
    Costs: state of 5.7 MiB in SmolLM2-135M, time of a token 1.65 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 99.6 % of the teacher's accuracy, projections copied, 64 of 256 tokens seen by softmax, in the grid on
        stories260K (experiments/subquadratic-stories/README.md)
    """

    expands: ClassVar[bool] = False
    notes: ClassVar[dict[str, str]] = {
        "q_map": "fresh: attention has no feature map; the identity before its softmax",
        "k_map": "fresh: attention has no feature map; the identity before its softmax",
        "window_gate": "fresh: attention has no weight of a window; without effect up to its length",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        window: PositiveInt = 64,
        feature_map: str = "hedgehog",
        gamma: Annotated[float, Field(gt=0, lt=1)] = 0.9,
        rotary: bool = True,
        conv: NonNegativeInt = 0,
        **common: Unpack[Basics],
    ) -> None:
        super().__init__(attention, rotary=rotary, conv=conv, **common)
        check_count("window", window, 1, MAX_TOKENS)
        if feature_map not in MAPS:
            raise ValueError(f"mixer.feature_map={feature_map!r}: choose one of {', '.join(MAPS)}")
        if not 0 < gamma < 1:
            raise ValueError(f"mixer.gamma must be in (0, 1), got {gamma}")
        self.window, self.feature_map = window, feature_map
        self.window_gate = nn.Parameter(torch.full((self.heads,), math.log(gamma / (1 - gamma))))
        if feature_map == "hedgehog":
            self.q_map: nn.Module = Hedgehog(self.heads, self.head_dim)
            self.k_map: nn.Module = Hedgehog(self.kv_heads, self.head_dim)

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Queries, keys and values; which tokens count."""
        q, k, v = self.qkv(x_BTD, context)
        seen = k.new_ones(k.shape[:2]) if context.seen is None else context.seen.to(k.dtype)
        return Streams(q, k, v, scale=self.scale, extra=(seen,))

    def mix(self, streams: Streams, context: Context, state_BGKV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mixed values [B, T, H, V] and the sum over the tokens behind the window [B, G, K', V + 1]."""
        s, tokens = streams, streams.q.shape[1]
        segments = _segments(s, context)
        k, v, seen = (self._row(x, context) for x in (s.k, s.v, s.extra[0]))
        # the window's tokens of the cache go on in the first token's document
        number = torch.cat([segments[:, :1].expand(-1, self.window), segments], dim=1).masked_fill(seen == 0, -1)
        context.last[-1] = (number[:, tokens:] == segments[:, -1:]).to(seen.dtype)
        phi_q, phi_k = self._maps()
        # token t finds in the state what has left its window: keys and values come w tokens late
        late = phi_k(k[:, :tokens]) * (number[:, :tokens] == segments)[..., None, None]
        linear, state = super().mix(
            Streams(phi_q(s.q), late, F.pad(v[:, :tokens], (0, 1), value=1.0)), context, state_BGKV
        )
        with torch.autocast(s.q.device.type, enabled=False):
            q, k, v = at_least_fp32(s.q) * s.scale, at_least_fp32(k), at_least_fp32(v)
            softmax = near(q, k, v, number, segments, size=self.chunk)
            o = self.window_gate.to(softmax.dtype).sigmoid()[:, None] * softmax + linear
        return o[..., :-1] / o[..., -1:].clamp_min(EPS), state

    def matrix(self, x_BTD: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """M [B, H, T, T] with `mix`'s output = M @ values, quadratic in T; rows sum to 1."""
        context = Context.of(x_BTD, mask, positions)
        s = self.streams(x_BTD, context)
        segments = _segments(s, context)
        number = segments.masked_fill(s.extra[0] == 0, -1)
        phi_q, phi_k = self._maps()
        with torch.autocast(x_BTD.device.type, enabled=False):
            own = (number[:, None] == segments[..., None])[:, None]
            back = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).tril()
            behind = back.tril(-self.window)
            softmax = unnormalised(pairs(at_least_fp32(s.q) * s.scale, at_least_fp32(s.k)), own & back & ~behind)
            linear = pairs(at_least_fp32(phi_q(s.q)), at_least_fp32(phi_k(s.k))) * (own & behind)
            both = self.window_gate.to(softmax.dtype).sigmoid()[:, None, None] * softmax + linear
        return both / both.sum(-1, keepdim=True).clamp_min(EPS)

    def _maps(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        if self.feature_map == "hedgehog":
            return self.q_map, self.k_map
        return FIXED[self.feature_map], FIXED[self.feature_map]

    def _row(self, x: Tensor, context: Context) -> Tensor:
        """The window before the first token and the tokens, [B, w + T, ...]; the last w go into the cache."""
        empty = x.new_zeros(len(x), self.window, *x.shape[2:])
        before = context.past[len(context.last)].to(x.dtype) if context.past else empty
        row = torch.cat([before, x], dim=1)
        context.last.append(row[:, x.shape[1] :])
        return row


def _segments(streams: Streams, context: Context) -> Tensor:
    """Document number of every token [B, T], zeros if there is one document."""
    if context.segments is not None:
        return context.segments
    return torch.zeros(streams.q.shape[:2], dtype=torch.long, device=streams.q.device)
