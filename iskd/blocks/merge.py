"""Two blocks as one of the same sizes: put side by side, the best heads and channels kept, outputs re-solved.

Side by side both read the stream that enters the lower one, so the merged block is what the pair would be if the upper
one did not read what the lower one writes. Half of its heads and channels then leave as in `slim`: channels by
elimination, and heads by their share in the stream (`choosing.head_scores`), but for pairs with so few key-value groups
that each choice is tried. What the heads that stay give is re-solved (o_proj) towards what all of them gave, where that
leaves the MLP less to make up for, and the MLP's output projection towards the teacher's state after the upper block.
The result is one of the host's own blocks: a model of such blocks loads anywhere.

One entrance norm serves both: with gains g and biases b of the norms, a projection of the upper block that read
g_u n + b_u reads g_l n + b_l with W' = W diag(g_u / g_l) and W b_u - W' b_l more bias. What that cannot carry is left
out and shows in the fit: a constant where the projection has no bias, and norms of queries and keys (Qwen3), which
stay those of the lower block. Two attentions that see other tokens or positions (`unlike`) have no common block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iskd.blocks.base import FitData
from iskd.blocks.choosing import choose_heads, down_system, eliminate, solve_down
from iskd.blocks.regression import Regression
from iskd.blocks.ridge import Ridge
from iskd.blocks.slicing import cut, resized, set_width
from iskd.models import Stack
from iskd.models.projections import set_submodule, stacked, weight_of

# a gain this much smaller than the largest one of its norm lets nothing through that could be scaled up again
_NO_GAIN = 1e-6
_ROUNDING = 1e-6  # nats
_BEHIND = (
    "blocks cannot be merged: what attention and MLP give passes a norm before it is added to the stream, so that two "
    "of them have no sum; use edit=remove"
)
_AFTER = (
    "blocks cannot be merged: a norm stands behind the sums of this model, so that two blocks have no norm in front of "
    "them that they could share; use edit=remove"
)


@dataclass(frozen=True)
class Merged:
    """What a merge was worth: nats per token to the teacher on held-out windows, removed alone and merged.

    Both before the refits of the stage, which go on with the better one. `why`: the two have no common block.
    """

    layer: int
    into: int
    removed: float
    merged: float
    why: str = ""

    @property
    def better(self) -> bool:
        """Whether the merged block stays."""
        return self.merged < self.removed - _ROUNDING

    def __str__(self) -> str:
        """For the run's record."""
        if self.why:
            return f"layer {self.layer} into {self.into}: not merged but removed, as {self.why}"
        kept = "merged" if self.better else "removed, as that is no farther"
        return (
            f"layer {self.layer} into {self.into}: held-out KL {self.removed:.4f} removed, {self.merged:.4f} merged; "
            f"{kept}"
        )


@torch.no_grad()
def merged(lower: nn.Module, upper: nn.Module, data: FitData, ridge: float | None = None) -> nn.Module:
    """The pair as one block of the lower one's class and sizes; both stay as they are.

    Args:
        lower: the block that stays in the stack.
        upper: the block that leaves.
        data: what enters the lower one, and the teacher's states after the upper one.
        ridge: of every fit, towards the inherited weights; None = chosen for each.

    Raises:
        ValueError: a projection of the blocks reads something else than a norm's output, the two attentions see other
            tokens or positions, or a fit is singular.
    """
    stack = data.stack
    check_mergeable(stack)
    if why := unlike(lower, upper, stack):
        raise ValueError(f"blocks cannot be merged, as {why}; use edit=remove")
    wide = side_by_side(lower, upper, data)
    _, narrow, system = choose_heads(wide, data, stack.dims.kv_heads, ridge)
    narrow, system = _with_solved_attention(wide, narrow, system, data, ridge)
    path = stack.family.down
    channels = eliminate(system, narrow.get_submodule(path), stack.dims.mlp, ridge)
    new = cut(narrow, stack, torch.arange(stack.dims.kv_heads, device=channels.device), channels)
    solve_down(new, path, system.only(channels), ridge)
    return new


def check_mergeable(stack: Stack) -> None:
    """Raise ValueError for a model of whose blocks no two can be merged."""
    if stack.family.post_norms:
        raise ValueError(_BEHIND)
    if not stack.reads_norms:
        raise ValueError(_AFTER)


def check_text(fit: Sequence[Tensor] | Tensor, held: Sequence[Tensor] | Tensor) -> None:
    """Raise ValueError for calibration windows, in batches [B, T] or not [N, T], that are too few to merge on."""
    if not (len(fit) and len(held)):
        raise ValueError(
            "a merge needs two calibration windows at least, one to fit to and one held out, and has "
            f"{len(fit) + len(held)}: raise run.fit_tokens, or use edit=remove"
        )


def unlike(lower: nn.Module, upper: nn.Module, stack: Stack) -> str:
    """Why two attentions cannot become one, by name; "" where nothing speaks against it.

    A block has one way to tell positions, and one window: heads of the other layer would see what they never saw.
    """
    ours, theirs = (dict(block.named_modules()).get(stack.family.attn) for block in (lower, upper))
    if ours is None or theirs is None:
        return f"the {'lower' if ours is None else 'upper'} one of the two has no attention"
    if bool(getattr(ours, "use_rope", True)) != bool(getattr(theirs, "use_rope", True)):
        which = "lower" if getattr(ours, "use_rope", True) else "upper"
        return f"only the {which} one of the two has rotary positions (no_rope_layers)"
    windows = [getattr(one, "sliding_window", None) for one in (ours, theirs)]
    if windows[0] != windows[1]:
        told = [f"a window of {window} tokens" if window else "all tokens" for window in windows]
        return f"the lower one attends to {told[0]} and the upper one to {told[1]} (layer_types)"
    return ""


def _with_solved_attention(
    wide: nn.Module, narrow: nn.Module, system: Regression, data: FitData, ridge: float | None
) -> tuple[nn.Module, Regression]:
    """`narrow` with its attention's output re-solved towards that of `wide`, where its MLP can then do more.

    Returns the better of the two blocks, and the normal equations of its MLP's output projection.
    """
    path = data.stack.family.out
    out, solved = narrow.get_submodule(path), copy.deepcopy(narrow)

    def add(part: FitData, sums: Ridge) -> None:
        for index, h, _, row_weight in part.rows():
            (inputs, _), (_, wanted) = (_passing(block, path, h, index, part) for block in (narrow, wide))
            sums.add(inputs, wanted, row_weight)

    solve_down(solved, path, data.regression(out, add, own=False), ridge)
    down = data.stack.family.down
    other = down_system(solved, down, data)
    ours, before = (each.best(block.get_submodule(down), ridge) for each, block in ((other, solved), (system, narrow)))
    return (solved, other) if ours.error < before.error else (narrow, system)


def _passing(block: nn.Module, path: str, h_BTD: Tensor, index: int, data: FitData) -> tuple[Tensor, Tensor]:
    """What goes into a projection of a block [B, T, F] and what comes out [B, T, D], on a batch of the stream."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = block.get_submodule(path).register_forward_hook(
        lambda _module, args, output: seen.append((args[0], output))
    )
    try:
        data.run(block, h_BTD, index)
    finally:
        handle.remove()
    inputs, output = (tensor.view(*h_BTD.shape[:2], -1) for tensor in seen[0])
    return inputs, output


@torch.no_grad()
def side_by_side(lower: nn.Module, upper: nn.Module, data: FitData) -> nn.Module:
    """A block with the heads and channels of both, which reads one stream."""
    stack, family = data.stack, data.stack.family
    wide = copy.deepcopy(lower)
    norms = _entrances(lower, data)
    for path in (*family.qkv, *family.ups):
        first, second = lower.get_submodule(path), upper.get_submodule(path)
        weight, bias = _behind(
            second, lower.get_submodule(norms[path]), upper.get_submodule(norms[path]), stack.dims.hidden
        )
        both = _interleaved(weight_of(first), weight, path, data)
        old_bias = getattr(first, "bias", None)
        both_bias = None if old_bias is None or bias is None else _interleaved(old_bias, bias, path, data)
        set_submodule(wide, path, resized(first, both, both_bias))
    for path in (family.out, family.down):
        first, second = lower.get_submodule(path), upper.get_submodule(path)
        bias = (
            None if getattr(first, "bias", None) is None else first.get_parameter("bias") + second.get_parameter("bias")
        )
        set_submodule(wide, path, resized(first, torch.cat([weight_of(first), weight_of(second)], dim=1), bias))
    set_width(wide, stack)
    return wide


def _interleaved(first: Tensor, second: Tensor, path: str, data: FitData) -> Tensor:
    """Rows of two projections one behind the other, within each part of one matrix (queries, keys, values)."""
    pairs = zip(_parts(first, path, data), _parts(second, path, data), strict=True)
    return torch.cat([part for pair in pairs for part in pair])


def _parts(values: Tensor, path: str, data: FitData) -> tuple[Tensor, ...]:
    family = data.stack.family
    if path in family.qkv and family.fused in ("thirds", "stacked"):
        return stacked(values, data.stack)
    return values.chunk(family.fused_ups) if path in family.ups else (values,)


def _behind(projection: nn.Module, norm: nn.Module, own: nn.Module, width: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection that reads `norm` and gives what it gave behind its `own` norm."""
    weight, bias = weight_of(projection), getattr(projection, "bias", None)
    (gain, shift), (own_gain, own_shift) = (_affine(module, width, weight) for module in (norm, own))
    ratio = torch.where(gain.abs() > _NO_GAIN * gain.abs().max(), own_gain / gain, torch.zeros_like(gain))
    moved = weight.double() * ratio
    if bias is not None:
        bias = (bias.double() + weight.double() @ own_shift - moved @ shift).to(bias.dtype)
    return moved.to(weight.dtype), bias


def _affine(norm: nn.Module, width: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gain [D] and bias [D] of a norm, up to one factor that all norms of a model share.

    Read off what it does to a probe of the kind of `weight`: families write gains in different ways (Gemma adds one).
    """
    probe = torch.ones(1, 1, width, device=weight.device, dtype=weight.dtype)
    probe[..., ::2] = -1.0
    probe -= probe.mean()  # no number is 0, and whether a norm takes the mean off makes no difference
    with torch.autocast(weight.device.type, enabled=False):
        shift = norm(torch.zeros_like(probe)).double().flatten()
        gain = (norm(probe).double().flatten() - shift) / probe.double().flatten()
    return gain, shift


def _entrances(block: nn.Module, data: FitData) -> dict[str, str]:
    """By path of a projection that reads the stream, the path of the norm between the two.

    Raises ValueError where there is none.
    """
    family = data.stack.family
    outputs: list[tuple[str, Tensor]] = []
    found: dict[str, str] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, output: outputs.append((name, output))

    def find(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: found.update((path, name) for name, output in outputs if output is args[0])

    norms = [(name, module) for name, module in block.named_modules() if "norm" in type(module).__name__.lower()]
    paths = (*family.qkv, *family.ups)
    handles = [module.register_forward_hook(note(name)) for name, module in norms]
    handles += [block.get_submodule(path).register_forward_pre_hook(find(path)) for path in paths]
    try:
        data.run(block, data.inputs[0], 0)
    finally:
        for handle in handles:
            handle.remove()
    missing = [path for path in paths if path not in found]
    if missing:
        raise ValueError(
            f"blocks cannot be merged: what enters {missing[0]} is not a norm's output, because norms stand behind "
            "the sums of this model; use edit=remove"
        )
    return found
