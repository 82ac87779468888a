"""The same block with fewer attention heads and MLP channels, weights inherited from the block it replaces.

Heads leave in whole key-value groups, so grouped-query attention stays valid. Channels are kept by how much they move the
stream on calibration tokens (rms activation times the norm of their output column); heads likewise by the size of their
contribution. Afterwards only the MLP's output projection is re-solved by ridge least squares on the student's own stream
(re-solving the attention's output as well hurts once heads are missing). With `select: l1` and no fit it is the structured
L1 pruning baseline: units ranked by the absolute sum of their weights, no data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iskd.arch import Family, Stack, set_submodule
from iskd.blocks.base import FitData, Ridge


class Slim:
    """Builds slimmed blocks; the result is one of the host's own blocks with smaller projections."""

    @classmethod
    def from_block(
        cls,
        old: nn.Module,
        stack: Stack,
        *,
        ratio: float | None = None,
        kv_groups: int | None = None,
        channels: int | None = None,
        select: str = "activation",
        ridge: float = 1e-2,
    ) -> nn.Module:
        """Keep `ratio` of the block's parameters, or exactly `kv_groups` key-value groups and `channels` MLP channels.

        Units are chosen by L1 weight here; `fit` chooses again by activation when `select` is "activation".
        Raises ValueError for a ratio outside (0, 1], too many groups or channels, or an unknown `select`.
        """
        if select not in ("activation", "l1"):
            raise ValueError(f"block.select={select!r}: choose 'activation' or 'l1'")
        groups, width = sizes(old, stack, ratio, kv_groups, channels)
        return cut(old, stack, top(l1_groups(old, stack), groups), top(l1_channels(old, stack.family), width))

    @staticmethod
    def fit(
        new: nn.Module, old: nn.Module, data: FitData, *, select: str = "activation", ridge: float = 1e-2, **_: object
    ) -> None:
        """Choose units by activation, then re-solve the MLP's output projection towards the teacher's block output."""
        family = data.stack.family
        if select == "activation":
            groups = _features(new.get_submodule(family.out)) // _group_width(data.stack)
            width = _features(new.get_submodule(family.down))
            head_score, channel_score = activation_scores(old, data)
            new.load_state_dict(cut(old, data.stack, top(head_score, groups), top(channel_score, width)).state_dict())
        _solve_down(new, family.down, data, ridge)


def sizes(
    old: nn.Module, stack: Stack, ratio: float | None, kv_groups: int | None, channels: int | None
) -> tuple[int, int]:
    """Key-value groups and channels that give the asked share of the block's parameters."""
    dims, family = stack.dims, stack.family
    if (ratio is None) == (kv_groups is None or channels is None):
        raise ValueError("slim: give either block.ratio, or both block.kv_groups and block.channels")
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"block.ratio must be in (0, 1], got {ratio}")
        total = sum(p.numel() for p in old.parameters())
        attention = sum(p.numel() for p in old.get_submodule(family.attn).parameters())
        channel = sum(_unit(old.get_submodule(p)) for p in family.ups) + dims.hidden
        # whole groups are rounded up: at equal size SmolLM2 loses less with more attention and fewer channels
        kv_groups = math.ceil(ratio * dims.kv_heads - 1e-9)
        rest = ratio * total - attention * kv_groups / dims.kv_heads
        multiple = 16 if dims.mlp >= 256 else 1  # kernels like multiples of 16
        channels = int(rest / channel) // multiple * multiple
        channels = min(dims.mlp, max(multiple, channels))
    assert kv_groups is not None
    assert channels is not None
    if not 1 <= kv_groups <= dims.kv_heads:
        raise ValueError(
            f"block.kv_groups={kv_groups}: the block has {dims.kv_heads} key-value groups; heads leave in whole groups"
        )
    if not 1 <= channels <= dims.mlp:
        raise ValueError(f"block.channels={channels}: the block's MLP has {dims.mlp} channels")
    return kv_groups, channels


def _unit(projection: nn.Module) -> int:
    """Parameters of one output unit of a projection: its weights and its bias."""
    return _features(projection) + int(getattr(projection, "bias", None) is not None)


def _transposed(projection: nn.Module) -> bool:
    """GPT-2 stores its projections as Conv1D, weight [in, out]."""
    return not isinstance(projection, nn.Linear)


def _weight(projection: nn.Module) -> Tensor:
    """Weight as [out, in]."""
    weight = projection.get_parameter("weight")
    return weight.T if _transposed(projection) else weight


def _features(projection: nn.Module) -> int:
    """Input features of a projection."""
    return _weight(projection).shape[1]


def _group_width(stack: Stack) -> int:
    """Width of one key-value group's attention output: its query heads times the head width."""
    return stack.dims.heads // stack.dims.kv_heads * stack.dims.head_dim


def top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; ties go to the lower index on every machine."""
    if score.is_meta:
        return torch.arange(count, device=score.device)
    return torch.sort(score.float(), descending=True, stable=True).indices[:count].sort().values


def l1_channels(block: nn.Module, family: Family) -> Tensor:
    """Absolute sum of all weights that belong to each MLP channel [C]."""
    score = _weight(block.get_submodule(family.down)).detach().abs().sum(0)
    for path in family.ups:
        score = score + _weight(block.get_submodule(path)).detach().abs().sum(1)
    return score


def l1_groups(block: nn.Module, stack: Stack) -> Tensor:
    """Absolute sum of the output weights of each key-value group [G]."""
    weight = _weight(block.get_submodule(stack.family.out)).detach().abs().sum(0)
    return weight.view(stack.dims.kv_heads, -1).sum(1)


@torch.no_grad()
def activation_scores(old: nn.Module, data: FitData) -> tuple[Tensor, Tensor]:
    """Size of what each key-value group [G] and each MLP channel [C] adds to the stream on calibration tokens.

    rms over tokens of the unit's activation, times the norm of its output column; rows weighted like the fit.
    """
    family = data.stack.family
    powers: dict[str, Tensor] = {}
    row_weight: list[Tensor] = []

    def watch(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float()
            power = (x.view(*row_weight[0].shape[:2], -1) * row_weight[0]).square().sum((0, 1))
            powers[path] = powers[path] + power if path in powers else power

        return old.get_submodule(path).register_forward_pre_hook(hook)

    handles = [watch(family.out), watch(family.down)]
    try:
        for index, h, _, weight in data.rows():
            row_weight[:] = [weight]
            data.run(old, h, index)
    finally:
        for handle in handles:
            handle.remove()
    sizes_ = {
        path: power.sqrt() * _weight(old.get_submodule(path)).float().norm(dim=0) for path, power in powers.items()
    }
    return sizes_[family.out].view(data.stack.dims.kv_heads, -1).square().sum(1), sizes_[family.down]


@torch.no_grad()
def cut(old: nn.Module, stack: Stack, groups: Tensor, channels: Tensor) -> nn.Module:
    """A copy of the block that keeps only the given key-value groups and MLP channels."""
    dims, family = stack.dims, stack.family
    queries = _expand(groups, _group_width(stack))
    keys = _expand(groups, dims.head_dim)
    new = copy.deepcopy(old)
    for path, index in zip(
        family.qkv, _qkv_rows(family, dims.hidden, dims.head_dim, groups, queries, keys), strict=True
    ):
        set_submodule(new, path, take(new.get_submodule(path), index, dim=0))
    set_submodule(new, family.out, take(new.get_submodule(family.out), queries, dim=1))
    for path in family.ups:
        set_submodule(new, path, take(new.get_submodule(path), channels, dim=0))
    set_submodule(new, family.down, take(new.get_submodule(family.down), channels, dim=1))
    attention = new.get_submodule(family.attn)
    for name, value in (("num_heads", len(queries) // dims.head_dim), ("split_size", len(queries))):
        if hasattr(attention, name):
            setattr(attention, name, value)
    return new


def _expand(units: Tensor, width: int) -> Tensor:
    """Indices of all features of some units that are `width` features wide."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _qkv_rows(
    family: Family, hidden: int, head_dim: int, groups: Tensor, queries: Tensor, keys: Tensor
) -> Sequence[Tensor]:
    if family.fused == "thirds":
        return [torch.cat([queries, queries + hidden, queries + 2 * hidden])]
    if family.fused == "heads":
        return [_expand(groups, 3 * head_dim)]
    return [queries, keys, keys]


def take(projection: nn.Module, index: Tensor, *, dim: int) -> nn.Module:
    """A projection with only some outputs (`dim=0`) or inputs (`dim=1`); index [n] counts features."""
    new = copy.deepcopy(projection)
    weight = _weight(projection).index_select(dim, index)
    new.weight = nn.Parameter((weight.T if _transposed(projection) else weight).contiguous())
    bias = getattr(projection, "bias", None)
    if bias is not None and dim == 0:
        new.bias = nn.Parameter(bias.index_select(0, index))
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = weight.shape
    elif hasattr(new, "nf"):
        new.nf, new.nx = weight.shape
    return new


@torch.no_grad()
def _solve_down(new: nn.Module, path: str, data: FitData, ridge: float) -> None:
    """Re-solve the projection at `path` so that the block's output meets the teacher's, all else held fixed."""
    projection = new.get_submodule(path)
    start, bias = _weight(projection), getattr(projection, "bias", None)
    seen: list[Tensor] = []
    handles = [
        projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0])),
        projection.register_forward_hook(lambda _module, _args, output: seen.append(output)),
    ]
    system = Ridge(start.shape[1], start.shape[0], bias=bias is not None, device=start.device)
    try:
        for index, h, target, weight in data.rows():
            output = data.run(new, h, index)
            added, features = seen.pop().view_as(output), seen.pop()
            system.add(features.view(*output.shape[:-1], -1), target - (output - added), weight)
    finally:
        for handle in handles:
            handle.remove()
    solved, solved_bias = system.solve(start, bias, ridge)
    projection.get_parameter("weight").copy_(solved.T if _transposed(projection) else solved)
    if solved_bias is not None:
        projection.get_parameter("bias").copy_(solved_bias)
