"""Laws of a map's regression: between two goals, with the ridge and the share that text held out asks for."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from iskd.blocks.base import FitData
from iskd.blocks.regression import SHARES, Regression
from iskd.blocks.ridge import RIDGES, Ridge
from iskd.models import Stack
from tests.factories import tiny

INPUTS, OUTPUTS = 12, 48


def rows(count: int, noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [1, N, F], what the teacher's own block gives there, and its state, which nobody could know."""
    truth = torch.randn(INPUTS, OUTPUTS, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, count, INPUTS, generator=generator)
    return x, x @ truth, x @ truth + noise * torch.randn(1, count, OUTPUTS, generator=generator)


def data_of(
    fit: tuple[Tensor, Tensor, Tensor], held: tuple[Tensor, Tensor, Tensor] | None, *, own: bool = True
) -> FitData:
    stack, (x, mine, goal) = Stack(tiny("llama")), fit
    others = None if held is None else FitData([held[0]], [held[2]], lambda _block, h, _: h, stack)
    return FitData([x], [goal], lambda _block, h, _: h, stack, [mine] if own else None, others)


def regression(module: nn.Linear, data: FitData) -> Regression:
    def add(part: FitData, sums: Ridge) -> None:
        for index, x, _, weight in part.rows():
            sums.add(x, torch.cat(part.goals(index), dim=-1), weight)

    return data.regression(module, add)


@pytest.mark.parametrize("bias", [True, False])
def test_the_choice_is_the_best_of_all_that_were_tried_one_by_one(bias: bool) -> None:
    """Each system solved by itself, towards the goal in between, and measured on the rows."""
    torch.manual_seed(1)
    module, fit, held = nn.Linear(INPUTS, OUTPUTS, bias=bias), rows(20, 1.0, 1), rows(50, 1.0, 2)
    found = regression(module, data_of(fit, held)).best(module)
    start, errors = Ridge(INPUTS, OUTPUTS, bias=bias, device=torch.device("cpu")), {}
    prior = start.start(module.weight, module.bias)
    for ridge, share in product(RIDGES, SHARES):
        system = Ridge(INPUTS, OUTPUTS, bias=bias, device=torch.device("cpu"))
        system.add(fit[0], torch.lerp(fit[1], fit[2], share), 1 / fit[2].norm(dim=-1, keepdim=True))
        weights = system.solution(prior, ridge)
        wrong = (weights.of(held[0].double()) - held[2]) / held[2].norm(dim=-1, keepdim=True)
        errors[ridge, share] = wrong.square().sum().item()
    assert (found.ridge, found.share) == min(errors, key=lambda key: errors[key])
    assert found.error == pytest.approx(min(errors.values()), rel=1e-4)
    at_these = regression(module, data_of(fit, held)).equations(prior, found.ridge, found.share)[1]
    torch.testing.assert_close(at_these[:INPUTS].T, found.solution.weight)


def test_noise_is_not_fitted_to_and_what_can_be_put_right_is() -> None:
    """The goal beyond the block's own is noise, or a map of the inputs: nothing of the way to it, and all of it."""
    module = nn.Linear(INPUTS, OUTPUTS)
    for noise, share in ((3.0, 0.0), (0.0, 1.0)):
        fit, held = rows(16, noise, 1), rows(200, 0.0 if noise else noise, 2)
        if not noise:
            fit, held = ((x, torch.zeros_like(mine), goal) for x, mine, goal in (fit, held))
        assert regression(module, data_of(fit, held)).best(module).share == share


def test_without_text_to_choose_by_it_goes_half_of_the_way_and_a_given_ridge_stays() -> None:
    module, fit = nn.Linear(INPUTS, OUTPUTS), rows(40, 1.0, 1)
    found = regression(module, data_of(fit, None)).best(module)
    assert (found.ridge, found.share) == (0.3, 0.5)
    assert regression(module, data_of(fit, rows(40, 1.0, 2))).best(module, 0.05).ridge == 0.05
    one = regression(module, data_of(fit, None, own=False))
    assert one.best(module, 0.05).share == 1.0
    x, _, goal = fit
    plain = Ridge(INPUTS, OUTPUTS, bias=True, device=x.device)
    plain.add(x, goal, 1 / goal.norm(dim=-1, keepdim=True))
    expected, _ = plain.solve(module.weight, module.bias, 0.05)
    torch.testing.assert_close(one.best(module, 0.05).solution.weight.float(), expected)


def test_singular_systems_are_passed_over_and_one_that_all_are_is_refused() -> None:
    module = nn.Linear(INPUTS, OUTPUTS, bias=False)
    same = torch.ones(1, 30, INPUTS), torch.ones(1, 30, OUTPUTS), torch.ones(1, 30, OUTPUTS)
    assert regression(module, data_of(same, same)).best(module).error < 1e-2
    with pytest.raises(ValueError, match="singular or not finite; raise its ridge"):
        regression(module, data_of(same, same)).best(module, 1e-30)
