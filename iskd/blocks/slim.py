"""Structured width pruning: the same block with fewer heads and MLP channels, weights inherited and re-fitted.

Heads leave in whole key-value groups, so grouped-query attention stays valid. Channels are kept by how much they move
the stream on calibration tokens (rms activation times the norm of their output column); heads likewise by the size of
their contribution. Afterwards only the MLP's output projection is re-solved by ridge least squares on the student's
own stream (re-solving the attention's output as well hurts once heads are missing). With `select: l1` and no fit it
is the structured L1 pruning baseline: units ranked by the absolute sum of their weights, no data.
"""

from __future__ import annotations

import copy
import math
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from iskd.blocks.base import FitData, fit_error
from iskd.blocks.choosing import choose_heads, down_system, eliminate, solve_down, top
from iskd.blocks.slicing import cut, group_width, inputs_of, unit_size
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
        156 s (experiments/warm-start/README.md)
    Costs for l1: `block.ratio` of the block's parameters, cache of the heads that stay
    Measured: KL 0.73, perplexity 34.66, 30 % of the block parameters out, healed (experiments/iskd-smollm2/README.md);
        KL 0.308 right after the fit, eight blocks at 41.7 % (experiments/warm-start/README.md)
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
        mlp: Annotated[float, Field(gt=0, le=1)] | None = None,
        select: str = "activation",
        ridge: NonNegativeFloat | None = None,
    ) -> nn.Module:
        """Keep `ratio` of the block's parameters, or exactly `kv_groups` key-value groups and `channels` MLP channels.

        Or all heads and the share `mlp` of the MLP's channels.
        Units are chosen by L1 weight here; `fit` chooses again by activation when `select` is "activation".
        Raises ValueError for a ratio outside (0, 1], too many groups or channels, or an unknown `select`.
        """
        if select not in ("activation", "l1"):
            raise ValueError(f"block.select={select!r}: choose 'activation' or 'l1'")
        groups, width = sizes(old, stack, ratio, kv_groups, channels, mlp)
        return cut(old, stack, top(l1_groups(old, stack), groups), top(l1_channels(old, stack.family), width))

    @staticmethod
    def fit(
        new: nn.Module,
        old: nn.Module,
        data: FitData,
        *,
        select: str = "activation",
        ridge: NonNegativeFloat | None = None,
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
            heads, wide, system = choose_heads(old, data, groups, ridge)
            channels = eliminate(system, wide.get_submodule(path), width, ridge)
            new.load_state_dict(cut(old, stack, heads, channels).state_dict())
            if not stack.family.post_norms:  # what a channel reads and gives does not depend on the others
                solve_down(new, path, system.only(channels), ridge)
                return
        if not stack.family.post_norms:
            solve_down(new, path, down_system(new, path, data), ridge)
            return
        # a norm behind it makes its output as large as it was, however little of it can be predicted: this may hurt
        before, kept = fit_error(new, data.judging), copy.deepcopy(new.get_submodule(path).state_dict())
        solve_down(new, path, down_system(new, path, data), ridge)
        if not fit_error(new, data.judging) < before:
            new.get_submodule(path).load_state_dict(kept)


def sizes(
    old: nn.Module,
    stack: Stack,
    ratio: float | None,
    kv_groups: int | None,
    channels: int | None,
    mlp: float | None = None,
) -> tuple[int, int]:
    """Key-value groups and channels that give the asked share of the block's parameters, or of its MLP's channels."""
    dims, family = stack.dims, stack.family
    multiple = 16 if dims.mlp >= 256 else 1  # kernels like multiples of 16
    if mlp is not None:
        if not 0 < mlp <= 1 or not ratio is kv_groups is channels is None:
            raise ValueError(
                f"slim: block.mlp={mlp} is a share of the MLP's channels, in (0, 1], and stands alone: set "
                "block.ratio=null, block.kv_groups=null and block.channels=null"
            )
        return dims.kv_heads, max(multiple, round(mlp * dims.mlp) // multiple * multiple)
    if (ratio is None) == (kv_groups is None or channels is None):
        raise ValueError(
            "slim: give either block.ratio, or both block.kv_groups and block.channels (with block.ratio=null)"
        )
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"block.ratio must be in (0, 1], got {ratio}")
        total = sum(p.numel() for p in old.parameters())
        attention = sum(p.numel() for p in old.get_submodule(family.attn).parameters())
        channel = family.fused_ups * sum(unit_size(old.get_submodule(p)) for p in family.ups) + dims.hidden
        # whole groups are rounded up: at equal size SmolLM2 loses less with more attention and fewer channels
        kv_groups = math.ceil(ratio * dims.kv_heads - 1e-9)
        rest = ratio * total - attention * kv_groups / dims.kv_heads
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


def l1_channels(block: nn.Module, family: Family) -> Tensor:
    """Absolute sum of all weights that belong to each MLP channel [C]."""
    score = weight_of(block.get_submodule(family.down)).detach().abs().sum(0)
    for path in family.ups:
        score = score + weight_of(block.get_submodule(path)).detach().abs().sum(1).view(family.fused_ups, -1).sum(0)
    return score


def l1_groups(block: nn.Module, stack: Stack) -> Tensor:
    """Absolute sum of the output weights of each key-value group [G]."""
    weight = weight_of(block.get_submodule(stack.family.out)).detach().abs().sum(0)
    return weight.view(stack.dims.kv_heads, -1).sum(1)
