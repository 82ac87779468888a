"""Sliding-window softmax attention with linear attention behind it (LoLCATs, arXiv 2410.10254, section 3).

    o_t = (gamma_h sum_{s near t} exp(q_t^T k_s / sqrt(K) - c_t) v_s + phi(q_t)^T S_t) / (the same with v = 1)
    S_t = sum_{s behind t} phi(k_s) v_s^T        c_t = the largest q_t^T k_s / sqrt(K) of those near       y_t = W_o o_t

Near t are the last w tokens and the sinks, which are the first tokens of t's document; all others before t are behind
it: a token moves from the window into the state as it leaves the window, and a sink never does. Without sinks a window
takes from softmax what most heads rest on (arXiv 2309.17453); 4 of them are enough. One normaliser for both parts. phi
is Hedgehog (learned, one map for q and one for k), elu + 1 or relu. gamma = sigmoid(window_gate) per query head.

With `feature_map=none` there is nothing behind: softmax in a window with sinks, which needs no training.

Copied: q, k, v and o, key-value heads grouped, and rotary positions, which come before phi. Fresh: the feature maps,
the identity before their softmax, and gamma. Up to w tokens gamma cancels and the mixer is the teacher's attention
itself, whatever the maps are. Behind the window untrained maps spread their weight too evenly, which a large gamma
limits: it starts at 0.9 here, at 0.1 in the published code.

A student may learn to do without what is behind (arXiv 2510.05901). `window_dropout` is that paper's cure, at one rate
where theirs goes by a schedule: in training some passes of a layer see one token and the sinks by softmax, and the
linear part answers for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import Attention, Basics, RecurrentMixer, Streams
from iskd.mixers.modules import Context
from iskd.mixers.modules.features import FIXED, SIGNED, Hedgehog
from iskd.mixers.modules.limits import MAX_TOKENS
from iskd.mixers.modules.window import Window, check_window, seen_of, segments_of
from iskd.mixers.ops.window import capped, pairs, places, unnormalised
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack

NONE = "none"
MAPS = ("hedgehog", *(name for name in FIXED if name not in SIGNED), NONE)
EPS = 1e-12  # what a hidden token, which sees nothing, is divided by
GAMMA = 0.9


class Sliding(RecurrentMixer):
    """Sliding-window softmax with linear attention behind it, over inherited projections.

    Its state is the sum [B, G, K', V + 1] over the tokens behind the window, fp32, and of the window's tokens the keys
    [B, w, G, K], the values [B, w, G, V] and which of them count [B, w]; the same of the sinks. Hedgehog has K' = 2K
    features, `feature_map=none` has K' = 0.

    Args:
        attention: what it is made from.
        window: tokens w that softmax sees, the present one included.
        sinks: first tokens of every document that softmax always sees, beside the window. The default of the code is 0,
            as students have it that were written before there were sinks; the config gives 4.
        feature_map: phi, one of `MAPS`; none = nothing is seen behind the window.
        gamma: where the weight of the window starts, in (0, 1).
        window_dropout: probability, in [0, 1), that a training pass of the layer sees one token instead of the window.
        rotary, conv, **common: as in `RecurrentMixer`.

    Raises:
        ValueError: a window or sinks out of their range (`iskd.mixers.modules.limits`), more sinks than the window has
            tokens, an unknown map, a gamma or dropout outside its range, or one of the two without a map.

    What for window: sliding-window softmax with the first tokens always visible, and nothing behind it
    Source: LoLCATs (arXiv 2410.10254); sinks: arXiv 2309.17453; window dropout: arXiv 2510.05901
    Source for window: arXiv 2309.17453
    Needs: attention's q, k, v and o
    Costs: state of 5.7 MiB in SmolLM2-135M, time of a token 1.65 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Costs for window: not measured
    Measured: 99.6 % of the teacher's accuracy, projections copied, 64 of 256 tokens seen by softmax, no sinks, in
        the grid on stories260K (experiments/subquadratic-stories/README.md)
    Measured for window: KL 0.294 with all layers of SmolLM2-135M, retention 90.3, no training
        (experiments/subquadratic-smollm2/README.md)
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
        sinks: NonNegativeInt = 0,
        feature_map: str = "hedgehog",
        gamma: Annotated[float, Field(gt=0, lt=1)] = GAMMA,
        window_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        rotary: bool = True,
        conv: NonNegativeInt = 0,
        **common: Unpack[Basics],
    ) -> None:
        super().__init__(attention, rotary=rotary, conv=conv, **common)
        check_window(window, sinks)
        if feature_map not in MAPS:
            raise ValueError(f"mixer.feature_map={feature_map!r}: choose one of {', '.join(MAPS)}")
        if not 0 < gamma < 1:
            raise ValueError(f"mixer.gamma must be in (0, 1), got {gamma}")
        if not 0 <= window_dropout < 1:
            raise ValueError(f"mixer.window_dropout must be in [0, 1), got {window_dropout}")
        self.window, self.sinks, self.feature_map = window, sinks, feature_map
        own, stack = attention.module, attention.stack
        copied = common.get("init", "copy") == "copy" and common.get("conv_activation", "identity") == "identity"
        turned = self.rotary is not None or not self.turnable
        # up to the attention's own window, where it has one
        sees = getattr(own, "sliding_window", getattr(stack.config, "sliding_window", None)) or MAX_TOKENS
        self._itself = min(window + sinks, sees) if copied and turned and self.heads == stack.dims.heads else 0
        self.linear = feature_map != NONE
        # a module, so that whoever asks whether this layer draws random numbers finds it
        self.window_dropout = nn.Dropout(window_dropout)
        if self.linear:
            self.window_gate = nn.Parameter(torch.full((self.heads,), math.log(gamma / (1 - gamma))))
        elif gamma != GAMMA or window_dropout:
            raise ValueError(
                "mixer.gamma and mixer.window_dropout weigh the window against what is behind it, and "
                f"mixer.feature_map={NONE} sees nothing there; leave them out, or choose another map"
            )
        if feature_map == "hedgehog":
            self.q_map: nn.Module = Hedgehog(self.heads, self.head_dim)
            self.k_map: nn.Module = Hedgehog(self.kv_heads, self.head_dim)

    @property
    def exact(self) -> int:
        """Up to as many tokens gamma cancels, and there is nothing behind; none where anything else differs."""
        return self._itself

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Queries, keys and values; padding is told apart by `mix`."""
        q, k, v = self.qkv(x_BTD, context)
        return Streams(q, k, v, scale=self.scale)

    def mix(self, streams: Streams, context: Context, state_BGKV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mixed values [B, T, H, V] and the sum over the tokens behind the window [B, G, K', V + 1]."""
        s, reach = streams, self._reach(context)
        near = Window.read(context, s.k, s.v, size=self.window, sinks=self.sinks)
        with torch.autocast(s.q.device.type, enabled=False):
            o = near.softmax(at_least_fp32(s.q) * s.scale, reach=reach, size=self.chunk, softcap=self.softcap)
        if self.linear:
            phi_q, phi_k = self._maps()
            # token t finds in the state what has left its window: keys and values come that much later
            k, v, counts = near.behind(reach)
            late = Streams(phi_q(s.q), phi_k(k) * counts[..., None, None], F.pad(v, (0, 1), value=1.0))
            linear, state = super().mix(late, context, state_BGKV)
            o = self.window_gate.to(o.dtype).sigmoid()[:, None] * o + linear
        else:
            state = o.new_zeros(len(o), self.kv_heads, 0, o.shape[-1])
        return o[..., :-1] / o[..., -1:].clamp_min(EPS), state

    def _reach(self, context: Context) -> int:
        """Tokens that softmax sees in this pass: the window, or by dropout one, where no cache goes on from it."""
        if not (self.training and self.window_dropout.p) or context.cached:
            return self.window
        # drawn on the host, which then need not wait for a device
        return self.window if bool(self.window_dropout(torch.ones(()))) else 1

    def matrix(self, x_BTD: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """M [B, H, T, T] with `mix`'s output = M @ values, quadratic in T; rows sum to 1."""
        context = Context.of(x_BTD, mask, positions)
        s, reach = self.streams(x_BTD, context), self._reach(context)
        segments, seen = segments_of(context, s.k), seen_of(context, s.k)
        number = segments.masked_fill(~seen, -1)
        first = (places(seen, segments) < self.sinks)[:, None, None]  # keys that are sinks
        with torch.autocast(x_BTD.device.type, enabled=False):
            own = (number[:, None] == segments[..., None])[:, None]
            back = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).tril()
            behind = back.tril(-reach) & ~first
            scores = capped(pairs(at_least_fp32(s.q) * s.scale, at_least_fp32(s.k)), self.softcap)
            both = unnormalised(scores, own & back & ~behind)
            if self.linear:
                phi_q, phi_k = self._maps()
                linear = pairs(at_least_fp32(phi_q(s.q)), at_least_fp32(phi_k(s.k))) * (own & behind)
                both = self.window_gate.to(both.dtype).sigmoid()[:, None, None] * both + linear
        return both / both.sum(-1, keepdim=True).clamp_min(EPS)

    def _maps(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        if self.feature_map == "hedgehog":
            return self.q_map, self.k_map
        return FIXED[self.feature_map], FIXED[self.feature_map]
