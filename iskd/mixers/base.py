"""The base of all mixers: from the stream to the inputs of one recurrence (`iskd.mixers.ops.recurrence`) and back.

A mixer is a class with

- `from_attention(old_attn, stack, **kwargs) -> nn.Module`: builds the mixer from the attention module it replaces,
  inheriting its projections; works on the meta device, so that a plan can count parameters without memory. Fresh
  weights may be drawn here: surgery calls it under the edit's own seed;
- `forward(x_BTD, *, mask, positions, cache) -> y_BTD`, no residual: norms, residual and MLP stay the host block's.
  `mask` is the host's; `iskd.models.hosting.kept` reads off it which tokens may enter the state. `positions` are
  [B, T] or [1, T], and a document begins where they do not grow; None = each row is one document, from its start.
  `cache` is a `iskd.models.cache.CacheSlot`; a mixer keeps a state of constant size there (`state`, `keep`);
- `matrix(x_BTD, *, mask, positions) -> [B, H, T, T]` if `exposes_matrix`: the weights with which tokens are mixed.

`RecurrentMixer` is all of this but for two methods: `streams`, the inputs of the recurrence, and, where norm, gate and
output projection are not enough, `output`. A mixer of another kind needs only the three above.

Sizes: B sequences, T tokens, D stream width, G key heads, H = G * R query heads (head h = g * R + r reads key head g),
K key width, V value width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers import ops
from iskd.mixers.modules import Context as Context  # every mixer's `streams` takes one
from iskd.mixers.modules import HeadNorm, Projections, Rotary, ShortConv, check_count
from iskd.mixers.modules.gates import activation_of
from iskd.mixers.modules.limits import MAX_CONV, MAX_TOKENS
from iskd.mixers.ops import Recurrence
from iskd.models import CacheSlot, Stack
from iskd.models.stack import class_of

if TYPE_CHECKING:
    from typing_extensions import Self

# what a report says of the modules that `RecurrentMixer` itself may have
_NOTES = {
    "convs": "fresh: attention has no short convolutions; they start as the identity",
    "norm": "fresh: attention has no norm on its heads' outputs; starts at the size of the copied values",
    "gate": "fresh: attention has no output gate; it starts open",
}


@dataclass(frozen=True)
class Attention:
    """The attention that a mixer is made from, and the model it stands in."""

    module: nn.Module
    stack: Stack


class Basics(TypedDict, total=False):
    """Keywords that every mixer takes and hands on to `RecurrentMixer`."""

    init: str
    heads: PositiveInt | None
    chunk: PositiveInt
    conv_activation: str


class Common(Basics, total=False):
    """These and those to which some mixers give another default or meaning."""

    conv: NonNegativeInt
    rotary: bool


@dataclass(frozen=True)
class Streams(Recurrence):
    """The inputs of the recurrence, and what turns its result into mixed values.

    Attributes:
        normalizer: from a token's sum of weights to what its mixed values are divided by; None = not divided.
        skip: [H], times the token's own value, added to the output (D of Mamba-2), or None.
        extra: whatever `output` needs from `streams`.
    """

    normalizer: Callable[[Tensor], Tensor] | None = None
    skip: Tensor | None = None
    extra: tuple[Tensor, ...] = ()

    def hiding(self, seen_BT: Tensor | None) -> Streams:
        """The same with hidden tokens that leave the state as it is: no key, no delta, no decay."""
        if seen_BT is None:
            return self
        beta, g = self.beta, self.g
        if beta is not None:
            beta = beta * seen_BT[..., None]
        if g is not None:
            g = g.masked_fill(~seen_BT.reshape(*seen_BT.shape, *[1] * (g.dim() - 2)), 0.0)
        return replace(self, k=self.k * seen_BT[..., None, None], beta=beta, g=g)


def _turned_in(attention: Attention) -> str | None:
    """Where the model of an attention has its rotary positions; None where that attention knows none."""
    turns = getattr(attention.module, "use_rope", True)  # some layers of SmolLM3 have no positions
    return attention.stack.family.rotary if turns else None


def rotary_of(attention: Attention) -> Rotary | None:
    """The rotary positions of an attention; None where it has none."""
    stack, path = attention.stack, _turned_in(attention)
    kind = getattr(attention.module, "layer_type", None)
    return Rotary(class_of(stack.base.get_submodule(path)), stack.config, kind) if path else None


class RecurrentMixer(nn.Module):
    """A mixer over inherited projections and the recurrence of `iskd.mixers.ops.recurrence`.

    A subclass makes its gates in `__init__`, sets `norm` and `gate` if its output has them, and writes `streams`. A
    `HeadNorm` then starts at the size of the copied values. With class attributes it says what it inherits:

        inherits: the projections that are copied, of q, k, v and o.
        expands: repeat the key-value heads to one per query head (for gates per head); otherwise they stay grouped.
        notes: by name of a child or parameter, "fresh: why"; of a projection that is not there, "dropped: why".
        exposes_matrix: whether the mixing is one matrix per head.

    Args:
        attention: what it is made from.
        init: "copy" the attention's weights, or "random": the ablation.
        heads: so many heads instead of the attention's: fewer are wider and hold a larger state.
        chunk: tokens per chunk of the recurrence; changes the speed, not the result.
        conv: tokens seen by a short convolution behind each of q, k and v; 0 = none.
        conv_activation: behind each of these, "identity" or, as most mixers are published, "silu".
        rotary: turn q and k by their position as the attention does; nothing in a family without rotary positions.

    Raises:
        ValueError: an unknown init, heads that do not divide, a chunk or conv out of its range
            (`iskd.mixers.modules.limits`), or rotary positions for a mixer that does not inherit queries and keys.
    """

    inherits: ClassVar[str] = "qkvo"
    expands: ClassVar[bool] = True
    notes: ClassVar[dict[str, str]] = {}
    keep_float32: ClassVar[tuple[str, ...]] = ()  # parameters of its own that are stored as such in half precision too
    exposes_matrix: ClassVar[bool] = True

    def __init__(
        self,
        attention: Attention,
        *,
        init: str = "copy",
        heads: PositiveInt | None = None,
        chunk: PositiveInt = 64,
        conv: NonNegativeInt = 0,
        conv_activation: str = "identity",
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.conv_activation = activation_of(conv_activation, "conv_activation")
        if conv_activation != "identity" and not conv:
            raise ValueError(
                f"mixer.conv_activation={conv_activation} stands behind short convolutions, and mixer.conv=0 has none; "
                "set mixer.conv=4, or mixer.conv_activation=identity"
            )
        check_count("chunk", chunk, 1, MAX_TOKENS)
        check_count("conv", conv, 0, MAX_CONV)
        if rotary and not {"q", "k"} <= set(self.inherits):
            raise ValueError(
                f"mixer.rotary=true turns the attention's queries and keys, but {type(self).__name__} has keys of its "
                "own; set mixer.rotary=false"
            )
        stack = attention.stack
        self.projections = Projections.copied(
            attention.module, stack, names=self.inherits, expand=self.expands, heads=heads, init=init
        )
        self.stream = stack.dims.hidden
        self.heads, self.kv_heads = self.projections.heads, self.projections.kv_heads
        self.head_dim, self.chunk = self.projections.head_dim, chunk
        widths = {name: self.projections.get_submodule(f"{name}_proj").out_features for name in self._qkv()}
        self.convs = nn.ModuleDict({name: ShortConv(int(width), conv) for name, width in widths.items() if conv})  # type: ignore[arg-type]
        self.turnable = _turned_in(attention) is not None
        self.rotary = rotary_of(attention) if rotary else None
        inner = self.projections.inner_dim**-0.5
        scaling = getattr(attention.module, "scaling", None) or inner  # of Gemma and Granite it is a number of its own
        self.scale = self.head_dim**-0.5 * (float(scaling) / inner)
        # Gemma 2's softmax; what of it a mixer keeps sees scores as it does
        self.softcap: float | None = getattr(attention.module, "attn_logit_softcapping", None)
        self.norm: nn.Module | None = None
        self.gate: nn.Module | None = None

    @classmethod
    def from_attention(cls, old_attn: nn.Module, stack: Stack, **kwargs: Any) -> Self:
        """The mixer that stands in for `old_attn`; keywords as in the class.

        Raises ValueError for a class without `streams` of its own: it is a base of mixers and none itself.
        """
        if cls.streams is RecurrentMixer.streams:
            raise ValueError(f"{cls.__module__}.{cls.__qualname__} is no mixer: it has no `streams` of its own")
        mixer = cls(Attention(old_attn, stack), **kwargs)
        if isinstance(mixer.norm, HeadNorm):
            mixer.norm.size_to(mixer.projections.get_submodule("v_proj").get_parameter("weight"))
        return mixer

    @property
    def turns(self) -> bool:
        """Whether what it says depends on the positions that it is told, and not on what stood before alone."""
        return self.rotary is not None

    @property
    def exact(self) -> int:
        """The tokens up to which it is the attention itself as it starts; most never are."""
        return 0

    @property
    def report(self) -> list[str]:
        """What is copied, fresh or dropped, and why, a line each."""
        missing = [f"{name}_proj" for name in "qkvo" if name not in self.inherits]
        own = [name for name in (*self._parameters, *self._modules) if name != "projections" and self._holds(name)]
        notes = {**_NOTES, **self.notes}
        turned = "copied" if self.turns else "not used: order reaches the mixer through causality and the stream"
        lines = [*self.projections.report, *(f"{name} {notes[name]}" for name in dict.fromkeys((*missing, *own)))]
        return [*lines, f"rotary {turned}"] if self.turnable else lines

    def _holds(self, name: str) -> bool:
        own = getattr(self, name)
        return isinstance(own, nn.Parameter) or (isinstance(own, nn.Module) and any(True for _ in own.parameters()))

    def _qkv(self) -> list[str]:
        return [name for name in "qkv" if name in self.inherits]

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """The inputs of the recurrence for the normalised stream [B, T, D]; hidden tokens are taken care of."""
        raise NotImplementedError

    def calibrate(self, memory_H: Tensor, strength_H: Tensor) -> list[str]:
        """Start the gates where the teacher's attention suggests; what was set, by name. Without gates, nothing.

        Args:
            memory_H: tokens, from 0.7 on, after which a head's decay is to have forgotten all but 1/e.
            strength_H: in (0, 1), how much of what a key finds a head's delta rule is to replace.
        """
        return []

    def output(self, o_BTHV: Tensor, x_BTD: Tensor, streams: Streams) -> Tensor:
        """Mixed values [B, T, H, V], in the core's wide dtype, to the stream [B, T, D]: norm, gate, o_proj."""
        if self.norm is not None:
            o_BTHV = self.norm(o_BTHV)
        o_BTHV = o_BTHV.to(x_BTD.dtype)
        return self.projections.out(o_BTHV if self.gate is None else self.gate(o_BTHV, x_BTD))

    def project(self, name: str, x_BTD: Tensor, context: Context) -> Tensor:
        """Inherited queries [B, T, H, K], keys [B, T, G, K] or values [B, T, G, V] ("q", "k", "v").

        In this order: projection, short convolution, the attention's own norm, rotary positions.
        """
        y_BTC = self.projections.get_submodule(f"{name}_proj")(x_BTD)
        if name in self.convs:
            conv = self.convs[name]
            assert isinstance(conv, ShortConv)
            y_BTC = self.conv_activation(context.conv(conv, y_BTC))
        y_BTHK = self.projections.shaped(name, y_BTC)
        if self.rotary is not None and name != "v":
            y_BTHK = self.rotary(y_BTHK, context.positions)
        return self.projections.regrouped(y_BTHK)

    def qkv(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """`project` of all three."""
        q, k, v = (self.project(name, x_BTD, context) for name in "qkv")
        return q, k, v

    def mix(self, streams: Streams, context: Context, state_BGKV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mixed values [B, T, H, V] and the state after the last token [B, G, K, V].

        With a normaliser the state has a column more: the sum of the weights is what mixing ones gives.
        """
        s, given = streams, streams
        if s.normalizer is not None:
            given = replace(s, v=F.pad(s.v, (0, 1), value=1.0))
        if s.v.shape[1] == 1:
            o, state = ops.step(given, state_BGKV=state_BGKV, segments_BT=context.segments)
        else:
            o, state = ops.chunk(given, state_BGKV=state_BGKV, segments_BT=context.segments, size=self.chunk)
        if s.normalizer is not None:
            o = o[..., :-1] / s.normalizer(o[..., -1:])
        if s.skip is not None:
            own = s.v.repeat_interleave(s.q.shape[2] // s.v.shape[2], dim=2)
            o = o + s.skip.to(o.dtype)[:, None] * own.to(o.dtype)
        return o, state

    def forward(
        self,
        x_BTD: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CacheSlot | None = None,
    ) -> Tensor:
        """Mix the normalised stream [B, T, D]; tokens that the mask hides do not enter the state.

        Raises ValueError when a mixer with rotary positions goes on from a cache and is not told the positions.
        """
        past = None if cache is None else cache.state()
        if past is not None and positions is None and self.turns:
            raise ValueError(f"{type(self).__name__} has rotary positions: it needs position_ids to go on from a cache")
        context = Context.of(x_BTD, mask, positions, past[1:] if past else ())
        context.cached = cache is not None
        streams = self.streams(x_BTD, context).hiding(context.seen)
        o_BTHV, state = self.mix(streams, context, past[0] if past else None)
        if cache is not None:
            # copies: as views they would keep the whole row of the prompt alive
            cache.keep((state, *(last.clone() for last in context.last)), tokens=x_BTD.shape[1])
        return self.output(o_BTHV, x_BTD, streams)

    def matrix(self, x_BTD: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """M [B, H, T, T] with `mix`'s output = M @ values: what a pass over [B, T, D] multiplies the values with.

        Normalised and with `skip` on the diagonal; quadratic in T. Raises ValueError when the mixer has none.
        """
        if not self.exposes_matrix:
            raise ValueError(f"{type(self).__name__} has no mixing matrix per head; align its outputs instead")
        context = Context.of(x_BTD, mask, positions)
        s = self.streams(x_BTD, context).hiding(context.seen)
        weights = ops.matrix(s, segments_BT=context.segments)
        if s.normalizer is not None:
            weights = weights / s.normalizer(weights.sum(-1, keepdim=True))
        if s.skip is not None:
            weights = weights + torch.diag_embed(s.skip.to(weights.dtype)[:, None].expand(-1, weights.shape[-1]))
        return weights
