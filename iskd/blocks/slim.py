"""Structured width pruning: the same block with fewer heads and MLP channels, weights inherited and re-fitted.

Heads leave in whole key-value groups, so grouped-query attention stays valid. Channels are kept by how much they move
the stream on calibration tokens (rms activation times the norm of their output column); heads likewise by the size of
their contribution. Afterwards only the MLP's output projection is re-solved by ridge least squares on the student's
own stream (re-solving the attention's output as well hurts once heads are missing). With `select: l1` and no fit it
is the structured L1 pruning baseline: units ranked by the absolute sum of their weights, no data.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from iskd.blocks.base import FitData, fit_error
from iskd.blocks.ridge import Ridge
from iskd.blocks.slicing import cut, group_width, inputs_of, transposed, unit_size
from iskd.models import Stack
from iskd.models.families import Family
from iskd.models.projections import weight_of


class Slim:
    """The replaced block with fewer heads and channels: one of the host's own blocks with smaller projections.

    What for l1: structured L1 pruning: heads and channels with the smallest absolute weights leave, no data is read
    Source: ours; channels leave as in ZipLM (arXiv 2302.04089, section 3)
    Source for l1: unit norms of Li et al. (arXiv 1608.08710), as a baseline of block replacement
    Needs: calibration tokens (`run.fit_tokens`)
    Needs for l1: nothing, with `edit.fit=false`
    Costs: `block.ratio` of the block's parameters, cache of the heads that stay; fits of eight blocks at 41.7 % take
        97 s (experiments/warm-start/README.md)
    Costs for l1: `block.ratio` of the block's parameters, cache of the heads that stay
    Measured: KL 0.73, perplexity 34.66, 30 % of the block parameters out, healed (experiments/iskd-smollm2/README.md);
        KL 0.347 right after the fit, eight blocks at 41.7 % (experiments/warm-start/README.md)
    Measured for l1: KL 5.51, 30 % of the block parameters out, healed (experiments/iskd-smollm2/README.md); KL 0.891
        unhealed, eight blocks at 41.7 % (experiments/warm-start/README.md)
    """

    @classmethod
    def from_block(
        cls,
        old: nn.Module,
        stack: Stack,
        *,
        ratio: Annotated[float, Field(gt=0, le=1)] | None = None,
        kv_groups: PositiveInt | None = None,
        channels: PositiveInt | None = None,
        select: str = "activation",
        ridge: NonNegativeFloat = 1e-2,
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
        new: nn.Module,
        old: nn.Module,
        data: FitData,
        *,
        select: str = "activation",
        ridge: NonNegativeFloat = 1e-2,
        **_: object,
    ) -> None:
        """Choose heads, then channels, on calibration tokens and re-solve the MLP's output projection.

        Heads see `choose_heads`; channels leave by backward elimination on the normal equations of the fit itself (see
        `eliminate`), so that a channel that others can stand in for goes first.
        """
        stack = data.stack
        path = stack.family.down
        if select == "activation":
            groups = inputs_of(new.get_submodule(stack.family.out)) // group_width(stack)
            width = inputs_of(new.get_submodule(path))
            heads, wide = choose_heads(old, data, groups, ridge)
            channels = eliminate(_down_system(wide, path, data), weight_of(wide.get_submodule(path)), width, ridge)
            new.load_state_dict(cut(old, stack, heads, channels).state_dict())
        _solve_down(new, path, _down_system(new, path, data), ridge)


def sizes(
    old: nn.Module, stack: Stack, ratio: float | None, kv_groups: int | None, channels: int | None
) -> tuple[int, int]:
    """Key-value groups and channels that give the asked share of the block's parameters."""
    dims, family = stack.dims, stack.family
    if (ratio is None) == (kv_groups is None or channels is None):
        raise ValueError(
            "slim: give either block.ratio, or both block.kv_groups and block.channels (with block.ratio=null)"
        )
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"block.ratio must be in (0, 1], got {ratio}")
        total = sum(p.numel() for p in old.parameters())
        attention = sum(p.numel() for p in old.get_submodule(family.attn).parameters())
        channel = sum(unit_size(old.get_submodule(p)) for p in family.ups) + dims.hidden
        # whole groups are rounded up: at equal size SmolLM2 loses less with more attention and fewer channels
        kv_groups = math.ceil(ratio * dims.kv_heads - 1e-9)
        rest = ratio * total - attention * kv_groups / dims.kv_heads
        multiple = 16 if dims.mlp >= 256 else 1  # kernels like multiples of 16
        channels = dims.mlp if ratio == 1 else int(rest / channel) // multiple * multiple
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


def top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; ties go to the lower index on every machine."""
    if score.is_meta:
        return torch.arange(count, device=score.device)
    return torch.sort(score.float(), descending=True, stable=True).indices[:count].sort().values


def l1_channels(block: nn.Module, family: Family) -> Tensor:
    """Absolute sum of all weights that belong to each MLP channel [C]."""
    score = weight_of(block.get_submodule(family.down)).detach().abs().sum(0)
    for path in family.ups:
        score = score + weight_of(block.get_submodule(path)).detach().abs().sum(1)
    return score


def l1_groups(block: nn.Module, stack: Stack) -> Tensor:
    """Absolute sum of the output weights of each key-value group [G]."""
    weight = weight_of(block.get_submodule(stack.family.out)).detach().abs().sum(0)
    return weight.view(stack.dims.kv_heads, -1).sum(1)


@torch.no_grad()
def choose_heads(old: nn.Module, data: FitData, count: int, ridge: float) -> tuple[Tensor, nn.Module]:
    """Key-value groups to keep [count], and the block with these and all of its channels.

    With at most four choices each is tried: what the MLP cannot make up for decides. Otherwise the groups that add most
    to the stream stay.
    """
    stack = data.stack
    device = next(old.parameters()).device
    every = torch.arange(stack.dims.mlp, device=device)
    choices = [top(head_scores(old, data), count)]
    if math.comb(stack.dims.kv_heads, count) <= 4:
        choices = [torch.tensor(c, device=device) for c in itertools.combinations(range(stack.dims.kv_heads), count)]
    best: tuple[float, Tensor, nn.Module] | None = None
    for heads in choices:
        wide = cut(old, stack, heads, every)
        if len(choices) == 1:
            return heads, wide
        refitted = copy.deepcopy(wide)
        _solve_down(refitted, stack.family.down, _down_system(wide, stack.family.down, data), ridge)
        error = fit_error(refitted, data)
        if best is None or error < best[0]:
            best = (error, heads, wide)  # the refitted one only told the error
    assert best is not None
    return best[1], best[2]


@torch.no_grad()
def head_scores(old: nn.Module, data: FitData) -> Tensor:
    """Size of what each key-value group adds to the stream on calibration tokens [G].

    rms over tokens of its activations, times the norm of their output columns; rows weighted like the fit.
    """
    projection = old.get_submodule(data.stack.family.out)
    power = torch.zeros(inputs_of(projection), device=weight_of(projection).device)
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        for index, h, _, weight in data.rows():
            data.run(old, h, index)
            # [B, T, inputs of the projection] -> [inputs], summed over tokens
            power += (seen.pop().float().view(*h.shape[:2], -1) * weight).square().sum((0, 1))
    finally:
        handle.remove()
    score = power * weight_of(projection).float().square().sum(0)
    return score.view(data.stack.dims.kv_heads, -1).sum(1)


@torch.no_grad()
def eliminate(system: Ridge, weight: Tensor, keep: int, ridge: float) -> Tensor:
    """Channels [keep] to keep, ascending: the ones left after removing the cheapest again and again.

    With H = X^T X + ridge and W the solution on the channels left, removing channel c and re-solving costs
    |W_c|^2 / (H^-1)_cc more squared error (optimal brain surgeon, Hassibi and Stork 1993; for whole columns ZipLM,
    arXiv 2302.04089, section 3). A sixty-fourth of the channels leaves per round.
    """
    # n inputs are C channels and, where the projection has a bias, a last one of ones, which never leaves
    gram, solution = system.normal_equations(weight, ridge)  # H [n, n], W [n, D]
    left = torch.arange(weight.shape[1], device=weight.device)
    inverse = torch.linalg.inv(gram)  # once; every round updates it
    while len(left) > keep:
        # squared error that leaving each channel out adds, once the others are re-solved [len(left)]
        cost = solution[: len(left)].square().sum(1) / inverse.diagonal()[: len(left)]
        # one at a time would be the exact greedy order, for many times the updates
        count = min(max(1, len(left) // 64), len(left) - keep)
        out = torch.sort(cost, stable=True).indices[:count]
        stay = torch.ones(len(gram), dtype=torch.bool, device=weight.device)
        stay[out] = False
        # block update of inverse and solution when rows and columns `out` leave the system: with A = H^-1
        #   A' = A_ss - A_so A_oo^-1 A_os        W' = W_s - A_so A_oo^-1 W_o
        # both right-hand factors from one solve [count, n - count + D]
        block = torch.linalg.solve(inverse[out][:, out], torch.cat([inverse[out][:, stay], solution[out]], dim=1))
        cross = inverse[stay][:, out]
        inverse = inverse[stay][:, stay] - cross @ block[:, : int(stay.sum())]
        solution = solution[stay] - cross @ block[:, int(stay.sum()) :]
        gram, left = gram[stay][:, stay], left[stay[: len(left)]]
    return left


@torch.no_grad()
def _down_system(block: nn.Module, path: str, data: FitData) -> Ridge:
    """Normal equations of the projection at `path`: its inputs against what is missing to the teacher's output."""
    projection = block.get_submodule(path)
    weight, bias = weight_of(projection), getattr(projection, "bias", None)
    seen: list[Tensor] = []
    handles = [
        projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0])),
        projection.register_forward_hook(lambda _module, _args, output: seen.append(output)),
    ]
    system = Ridge(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    try:
        for index, h, target, row_weight in data.rows():
            output = data.run(block, h, index)
            # what the projection should add is the teacher's output less all that the rest of the block gives
            added, inputs = seen.pop().view_as(output), seen.pop()
            system.add(inputs.view(*output.shape[:-1], -1), target - (output - added), row_weight)
    finally:
        for handle in handles:
            handle.remove()
    return system


@torch.no_grad()
def _solve_down(block: nn.Module, path: str, system: Ridge, ridge: float) -> None:
    """Re-solve the projection at `path`, pulled towards the weights it inherited, all else held fixed."""
    projection = block.get_submodule(path)
    solved, bias = system.solve(weight_of(projection), getattr(projection, "bias", None), ridge)
    projection.get_parameter("weight").copy_(solved.T if transposed(projection) else solved)
    if bias is not None:
        projection.get_parameter("bias").copy_(bias)
