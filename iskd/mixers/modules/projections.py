"""Projections that a mixer inherits from its attention: queries, keys, values and output, and their norms.

The copy table is that of arXiv 2504.14366 ("QKV copying"): every weight and bias goes where the mixer has a place for
it. Key-value heads stay grouped or are repeated to one per query head, in the order of repeat_interleave and of every
host: query head h = g * R + r reads key-value head g.

What is no weight is left behind: attention dropout in every family, and in GPT-2, whose attention drops out channels of
its output as well, that dropout too (`resid_pdrop`; elsewhere it is the block's and stays).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from iskd.models import Stack
from iskd.models.projections import qkv_of, weight_of

INITS = ("copy", "random")


class Projections(nn.Module):
    """Copies of an attention's q, k, v and output projections, and of its q and k norms (Qwen3, Phi) if it has them.

    Attributes:
        heads, kv_heads, head_dim: query heads H, key-value heads G and their width K, as the mixer sees them.
        report: what became of each projection and norm of the attention, a line each.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        norms: Mapping[str, nn.Module],
        *,
        sizes: tuple[int, int, int],
        inner_dim: int,
        report: Sequence[str],
    ) -> None:
        """Sizes are (heads, kv_heads, head_dim); `inner_dim` is the width of a head for the norms: the attention's."""
        super().__init__()
        for name, layer in layers.items():
            self.add_module(f"{name}_proj", layer)
        for name in ("q", "k"):
            self.add_module(f"{name}_norm", norms.get(name, nn.Identity()))
        self.heads, self.kv_heads, self.head_dim = sizes
        self.inner_dim = inner_dim
        self.report = list(report)

    @classmethod
    def copied(
        cls,
        old_attn: nn.Module,
        stack: Stack,
        *,
        names: str = "qkvo",
        expand: bool = False,
        heads: int | None = None,
        init: str = "copy",
    ) -> Projections:
        """Copy what `old_attn` holds; heads are counted from its weights, so a slimmed block's attention will do.

        Args:
            old_attn: the attention; a module of `stack`'s family.
            stack: the model it comes from.
            names: which of q, k, v and o the mixer has a place for.
            expand: repeat the key-value heads to one per query head.
            heads: so many heads instead of the attention's, of the width that keeps their sum; implies `expand`.
            init: "copy", or "random" to draw the weights anew: the ablation of copying.

        Raises:
            ValueError: an unknown `init`, or heads that do not divide.
        """
        if init not in INITS:
            raise ValueError(f"mixer.init={init!r}: choose one of {', '.join(INITS)}")
        width = stack.dims.head_dim
        found = dict(zip("qkv", qkv_of(old_attn, stack), strict=True))
        inner, groups = (found[name][0].shape[0] // width for name in "qk")
        sizes = _sizes(inner, groups, width, expand, heads)
        repeats = inner // groups if expand or heads is not None else 1
        for name in "kv" if repeats > 1 else "":
            found[name] = (_repeat(found[name][0], repeats, width), _repeat_bias(found[name][1], repeats, width))
        inside = f"{stack.family.attn}."
        out = old_attn.get_submodule(stack.family.out.removeprefix(inside))
        found["o"] = (weight_of(out), getattr(out, "bias", None))
        layers = {name: linear(*found[name]) for name in names}
        norm_paths = {path.split(".")[-1][0]: path.removeprefix(inside) for path in stack.family.qk_norms}
        norms = {
            name: copy.deepcopy(old_attn.get_submodule(path))
            for name, path in norm_paths.items()
            if name in names and hasattr(old_attn, path)
        }
        gain = getattr(norms.get("k"), "weight", None)
        if repeats > 1 and gain is not None and gain.numel() > width:
            norms["k"].weight = nn.Parameter(_repeat(gain.detach(), repeats, width).clone())
        if init == "random":
            _redraw(layers.values(), norms.values(), float(getattr(stack.config, "initializer_range", 0.02)))
        verb = "copied" if init == "copy" else "fresh: mixer.init=random"
        regrouped = sizes[0] if sizes[2] != width else None
        report = [f"{name}_proj {verb}{_heads(name, verb, groups, repeats, regrouped)}" for name in names]
        report += [f"{name}_norm {verb}" for name in norms]
        return cls(layers, norms, sizes=sizes, inner_dim=width, report=report)

    def shaped(self, name: str, y_BTC: Tensor) -> Tensor:
        """Projected queries, keys or values ("q", "k", "v") as heads of the attention [B, T, heads, K], normed."""
        norm = nn.Identity() if name == "v" else self.get_submodule(f"{name}_norm")
        gain = getattr(norm, "weight", None)
        # under autocast a norm with float32 weights widens; the kernels take q, k and v of one dtype
        if gain is not None and gain.numel() > self.inner_dim:  # OLMo 2: one norm for all heads
            return norm(y_BTC).to(y_BTC.dtype).unflatten(-1, (-1, self.inner_dim))
        y_BTHK: Tensor = norm(y_BTC.unflatten(-1, (-1, self.inner_dim)))
        return y_BTHK.to(y_BTC.dtype)

    def regrouped(self, y_BTHK: Tensor) -> Tensor:
        """Heads of the attention as heads of the mixer: the same, unless `heads` asked for another number."""
        return y_BTHK if self.head_dim == self.inner_dim else y_BTHK.flatten(2).unflatten(-1, (-1, self.head_dim))

    def out(self, o_BTHV: Tensor) -> Tensor:
        """Mixed values back into the stream [B, T, D]."""
        y_BTD: Tensor = self.get_submodule("o_proj")(o_BTHV.flatten(2))
        return y_BTD


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of a weight [out, in] and a bias [out] (None = without); draws no random numbers."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(memory_format=torch.contiguous_format))
    return layer


def _sizes(inner: int, groups: int, width: int, expand: bool, heads: int | None) -> tuple[int, int, int]:
    """Heads, key-value heads and head width of the mixer. Raises ValueError when they do not divide."""
    if inner % groups:
        raise ValueError(
            f"the attention has {inner} query heads for {groups} key-value heads, which does not divide; "
            "a mixer needs the same number of query heads for each"
        )
    if heads is None:
        return inner, inner if expand else groups, width
    if heads < 1 or inner * width % heads:
        raise ValueError(
            f"mixer.heads={heads} does not divide the {inner * width} channels of the attention "
            f"({inner} heads of {width}); choose a divisor, or null for the attention's own heads"
        )
    return heads, heads, inner * width // heads


def _repeat(weight: Tensor, repeats: int, width: int) -> Tensor:
    heads: Tensor = weight.unflatten(0, (-1, width))
    return heads.repeat_interleave(repeats, dim=0).flatten(0, 1)


def _repeat_bias(bias: Tensor | None, repeats: int, width: int) -> Tensor | None:
    return None if bias is None else _repeat(bias, repeats, width)


def _heads(name: str, verb: str, groups: int, repeats: int, regrouped: int | None) -> str:
    """What the report says of the heads of a projection; `regrouped` into so many, None = they are as they were."""
    repeated = f"{groups} heads, each {repeats} times" if name in "kv" and repeats > 1 else ""
    if verb != "copied":
        return f"; {repeated}" if repeated else ""
    if name == "o" or regrouped is None:
        return f": {repeated}" if repeated else ""
    return f", regrouped into {regrouped} heads" + (f": the attention's {repeated}" if repeated else "")


@torch.no_grad()
def _redraw(layers: Iterable[nn.Linear], norms: Iterable[nn.Module], std: float) -> None:
    """As a host draws its own: normal weights, zero biases, norms that only normalise."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for norm in norms:
        for name, parameter in norm.named_parameters():
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
