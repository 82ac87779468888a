"""Which heads and channels of a block stay, on calibration tokens, and what its MLP then writes to the stream."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import torch
from torch import Tensor, nn

from iskd.blocks.base import FitData, fit_error
from iskd.blocks.regression import Best, Regression
from iskd.blocks.ridge import Ridge, Solution
from iskd.blocks.slicing import cut, group_width, inputs_of, transposed
from iskd.models.projections import weight_of

_RIDGE = 0.1  # of eliminations, where none is given
_CROWDED = 0.85  # of the rows of a matrix are to be in use


def top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; ties go to the lower index on every machine.

    Raises ValueError for a score that is not finite, which would stay or go by chance.
    """
    if score.is_meta:
        return torch.arange(count, device=score.device)
    if not bool(score.isfinite().all()):
        raise ValueError(
            "heads and channels of a block cannot be ordered: what they give on calibration text is not finite; check "
            "the weights of teacher and student, or train in float32 (trainer.precision=32-true)"
        )
    return torch.sort(score.float(), descending=True, stable=True).indices[:count].sort().values


@torch.no_grad()
def choose_heads(
    old: nn.Module, data: FitData, count: int, ridge: float | None
) -> tuple[Tensor, nn.Module, Regression]:
    """Key-value groups to keep [count], the block with these and all of its channels, and its `down_system`.

    With at most four choices each is tried: what the MLP cannot make up for decides. Otherwise the groups that add most
    to the stream stay.
    """
    stack = data.stack
    device = next(old.parameters()).device
    path = stack.family.down
    every = torch.arange(inputs_of(old.get_submodule(path)), device=device)
    present = inputs_of(old.get_submodule(stack.family.out)) // group_width(stack)
    if math.comb(present, count) <= 4:
        choices = [torch.tensor(c, device=device) for c in itertools.combinations(range(present), count)]
    else:
        choices = [top(head_scores(old, data), count)]
    best: tuple[float, Tensor, nn.Module, Regression] | None = None
    for heads in choices:
        wide = cut(old, stack, heads, every)
        known = old, tuple(heads.tolist())
        if known not in data.systems:
            data.systems[known] = down_system(wide, path, data)
        system = data.systems[known]
        error = 0.0
        if len(choices) > 1:
            solved = system.best(wide.get_submodule(path), ridge)
            ridge = solved.ridge  # the search is made once
            error = solved.error
            if stack.family.post_norms:  # where the sums do not tell it without a pass
                error = fit_error(resolved(wide, path, solved), data.judging)
        if best is None or error < best[0]:
            best = (error, heads, wide, system)
    assert best is not None
    return best[1:]


def resolved(block: nn.Module, path: str, best: Best) -> nn.Module:
    """A copy of a block whose projection at `path` has other weights."""
    found = copy.deepcopy(block)
    write(found.get_submodule(path), best.solution)
    return found


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
    return score.view(-1, group_width(data.stack)).sum(1)


@torch.no_grad()
def eliminate(system: Regression, projection: nn.Module, keep: int, ridge: float | None) -> Tensor:
    """Channels [keep] to keep, ascending: the ones left after removing the cheapest again and again.

    `projection` has the weights that the fit holds on to. Cheap is what this block can do without, not what it could
    put right of others: the goal is what the teacher's own blocks give on its stream. With H = X^T X + ridge and W the
    solution on the channels left, removing channel c and re-solving costs |W_c|^2 / (H^-1)_cc more squared error
    (optimal brain surgeon, Hassibi and Stork 1993; for whole columns ZipLM, arXiv 2302.04089, section 3). A
    sixty-fourth of the channels leaves per round.
    """
    # n inputs are C channels and, where the projection has a bias, a last one of ones, which never leaves
    weight = weight_of(projection)
    channels = weight.shape[1]
    # the matrix whose inverse every round updates [n, n], and the weights that solve it [n, D]
    start = system.fit.start(weight, getattr(projection, "bias", None))
    gram, solution = system.equations(start, _RIDGE if ridge is None else ridge, share=0.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    number = torch.arange(channels, device=weight.device)  # of the channel in each row
    live = torch.ones(channels, dtype=torch.bool, device=weight.device)
    left = channels
    while left > keep:
        # squared error that leaving each channel out adds, once the others are re-solved [len(number)]
        cost = solution[: len(number)].square().sum(1) / inverse.diagonal()[: len(number)]
        # one at a time would be the exact greedy order, for many times the updates
        count = min(max(1, left // 64), left - keep)
        out = torch.sort(torch.where(live, cost, torch.inf), stable=True).indices[:count]
        # block update of inverse and solution when rows and columns `out` leave the system: with A = H^-1
        #   A' = A - A_:o A_oo^-1 A_o:        W' = W - A_:o A_oo^-1 W_o
        # which leaves zeros in these rows and columns; they are taken out of memory once they are many
        cross = inverse[:, out]
        block = torch.linalg.solve(inverse[out][:, out], torch.cat([inverse[out], solution[out]], dim=1))
        inverse.addmm_(cross, block[:, : len(inverse)], alpha=-1.0)
        solution.addmm_(cross, block[:, len(inverse) :], alpha=-1.0)
        live[out] = False
        left -= count
        if left < _CROWDED * len(number):
            rows = torch.cat([live, live.new_ones(len(inverse) - len(number))]).nonzero()[:, 0]
            inverse, solution = inverse[rows][:, rows], solution[rows]
            number, live = number[live], live[live]
    return number[live]


@torch.no_grad()
def down_system(block: nn.Module, path: str, data: FitData) -> Regression:
    """Normal equations of the projection at `path`: its inputs against what is missing to the teacher's output.

    Where a norm stands behind it (Gemma 2, OLMo 2), what the norm should give is traced back to what should enter it,
    g y / rms(y) at today's rms(y), and an error there counts as much as it does behind the norm.
    """
    return data.regression(block.get_submodule(path), partial(_add_lacking, block, path))


def _add_lacking(block: nn.Module, path: str, data: FitData, sums: Ridge) -> None:
    projection, norms = block.get_submodule(path), data.stack.family.post_norms
    last = block.get_submodule(norms[-1]) if norms else projection
    scale, gain = data.stack.residual_scale, _gain(last, weight_of(projection)) if norms else None
    inputs: list[Tensor] = []
    given: list[Tensor] = []
    handles = [
        projection.register_forward_pre_hook(lambda _module, args: inputs.append(args[0])),
        projection.register_forward_hook(lambda _module, _args, output: given.append(output)),
        *([last.register_forward_hook(lambda _module, _args, output: given.append(output))] if norms else []),
    ]
    try:
        for index, h, _, row_weight in data.rows():
            output = data.run(block, h, index)
            # what the projection should add is the goal less all that the rest of the block gives
            added, entered = given[-1].view_as(output), given[0]
            wanted, weight = [(goal - (output - scale * added)) / scale for goal in data.goals(index)], row_weight
            if gain is not None:
                size = entered.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)  # [B, T, 1]
                wanted, weight = [size * each.float() / gain for each in wanted], row_weight / size
            sums.add(inputs[0].view(*output.shape[:-1], -1), torch.cat(wanted, dim=-1), weight)
            inputs.clear()
            given.clear()
    finally:
        for handle in handles:
            handle.remove()


def _gain(norm: nn.Module, weight: Tensor) -> Tensor:
    """Gains [D] of an RMS norm, read off what it does to a probe (Gemma adds one), none of them near 0."""
    probe = torch.ones(1, 1, weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.autocast(weight.device.type, enabled=False):
        gain = norm(probe).float().flatten()
    least = 1e-2 * gain.abs().max()
    return torch.where(gain.abs() < least, least, gain)


@torch.no_grad()
def solve_down(block: nn.Module, path: str, system: Regression, ridge: float | None) -> None:
    """Re-solve the projection at `path`, pulled towards the weights it inherited, all else held fixed."""
    projection = block.get_submodule(path)
    write(projection, system.best(projection, ridge).solution)


@torch.no_grad()
def write(projection: nn.Module, solution: Solution) -> None:
    """Give a linear map new weights, the way its family stores them."""
    projection.get_parameter("weight").copy_(solution.weight.T if transposed(projection) else solution.weight)
    if solution.bias is not None:
        projection.get_parameter("bias").copy_(solution.bias)
