"""Laws of choosing heads and channels: sums shared between fits, and channels left out in place, change no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iskd.blocks import inputs_of
from iskd.blocks.base import FitData, fit_error
from iskd.blocks.choosing import choose_heads, down_system, eliminate, solve_down
from iskd.blocks.regression import Regression
from iskd.blocks.ridge import Ridge
from iskd.blocks.slicing import cut
from iskd.blocks.slim import Slim
from iskd.models import Stack
from iskd.models.block_calls import BlockCalls
from iskd.models.projections import weight_of
from tests.factories import louder, tiny, windows

LAYER, RIDGE = 1, 1e-2
FAMILIES = ("llama", "gpt2", "gemma2", "opt")


@torch.no_grad()
def layer_of(family: str) -> tuple[nn.Module, FitData]:
    """A block of a tiny teacher, and its own input and output on two batches."""
    stack = Stack(louder(tiny(family)))
    calls = [BlockCalls(stack, windows(4, 16, seed=seed)) for seed in range(2)]
    streams = [call.embedded for call in calls]
    for below in range(LAYER):
        streams = [call.run(below, stack.layers[below], h) for call, h in zip(calls, streams, strict=True)]
    old = stack.layers[LAYER]
    goals = [call.run(LAYER, old, h).float() for call, h in zip(calls, streams, strict=True)]
    return old, FitData(streams, goals, lambda block, h, index: calls[index].run(LAYER, block, h), stack)


@torch.no_grad()
def slowly_eliminated(system: Ridge, projection: nn.Module, keep: int) -> Tensor:
    """Channels that stay: in every round the matrix of those that are left is inverted, and solved, anew."""
    left = torch.arange(inputs_of(projection))
    while len(left) > keep:
        rest = system.only(left)
        bias = getattr(projection, "bias", None)
        # the ridge is one of the whole system in all rounds
        strength = RIDGE * system.sums[:-1].diagonal().mean() / rest.sums[:-1].diagonal().mean()
        gram, solved = rest.normal_equations(weight_of(projection)[:, left], float(strength), bias)
        cost = solved[: len(left)].square().sum(1) / torch.linalg.inv(gram).diagonal()[: len(left)]
        count = min(max(1, len(left) // 64), len(left) - keep)
        out = torch.sort(cost, stable=True).indices[:count]
        left = left[[at for at in range(len(left)) if at not in out.tolist()]]
    return left


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_leave_as_if_all_was_solved_anew(family: str) -> None:
    old, data = layer_of(family)
    path = data.stack.family.down
    system, projection = down_system(old, path, data), old.get_submodule(path)
    channels = inputs_of(projection)
    for keep in (channels, channels // 2, channels // 8):
        found = eliminate(system, projection, keep, RIDGE)
        assert found.tolist() == slowly_eliminated(system.fit, projection, keep).tolist()


def test_many_channels_leave_by_rounds() -> None:
    """Wide enough for several channels in a round, and for rows to be taken out of memory."""
    torch.manual_seed(0)
    x, projection = torch.randn(800, 300), nn.Linear(300, 6)
    system = Ridge(300, 6, bias=True, device=x.device)
    system.add(x @ torch.randn(300, 300).div(17), torch.randn(800, 6), torch.rand(800, 1))
    assert (
        eliminate(Regression(system, None, 6), projection, 40, RIDGE).tolist()
        == slowly_eliminated(system, projection, 40).tolist()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_equations_of_some_channels_are_those_of_the_block_that_has_them(family: str) -> None:
    old, data = layer_of(family)
    path, stack = data.stack.family.down, data.stack
    channels = torch.arange(0, inputs_of(old.get_submodule(path)), 3)
    narrow = cut(old, stack, torch.arange(stack.dims.kv_heads), channels)
    if stack.family.post_norms:
        pytest.skip("what a norm behind it should be given depends on all channels")
    found, slow = down_system(old, path, data).only(channels), down_system(narrow, path, data)
    torch.testing.assert_close(found.fit.sums, slow.fit.sums, rtol=1e-4, atol=1e-4)
    assert found.fit.rows == slow.fit.rows == 128


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [{"ratio": 0.5}, {"mlp": 0.5}])
@torch.no_grad()
def test_a_fit_by_shared_sums_is_the_one_by_passes(family: str, sizes: dict[str, Any]) -> None:
    """Every head choice refitted and run, the equations of the narrow block summed up anew: as far from the teacher."""
    old, data = layer_of(family)
    path, stack = data.stack.family.down, data.stack
    fast = Slim.from_block(old, stack, **sizes)
    Slim.fit(fast, old, data, ridge=RIDGE)
    groups = (
        inputs_of(fast.get_submodule(stack.family.out))
        * stack.dims.kv_heads
        // inputs_of(old.get_submodule(stack.family.out))
    )
    heads, wide, *_ = choose_heads(old, data, groups, RIDGE)
    channels = eliminate(
        down_system(wide, path, data), wide.get_submodule(path), inputs_of(fast.get_submodule(path)), RIDGE
    )
    slow = cut(old, stack, heads, channels)
    before = fit_error(slow, data)
    solve_down(slow, path, down_system(slow, path, data), RIDGE)
    least = min(before, fit_error(slow, data)) if stack.family.post_norms else fit_error(slow, data)
    assert fit_error(fast, data) == pytest.approx(least, rel=1e-4)


@torch.no_grad()
def test_heads_are_chosen_as_if_each_choice_was_built_and_run() -> None:
    old, data = layer_of("llama")
    path, stack = data.stack.family.down, data.stack
    every = torch.arange(inputs_of(old.get_submodule(path)))
    errors = []
    for head in range(stack.dims.kv_heads):
        block = cut(old, stack, torch.tensor([head]), every)
        solve_down(block, path, down_system(block, path, data), RIDGE)
        errors.append(fit_error(block, data))
    heads, *_ = choose_heads(old, data, 1, RIDGE)
    assert heads.tolist() == [errors.index(min(errors))]


@torch.no_grad()
def test_fits_that_share_their_sums_have_the_same_bits_as_alone() -> None:
    old, data = layer_of("llama")
    _, others = layer_of("llama")
    alone, shared = (Slim.from_block(old, data.stack, mlp=0.5) for _ in range(2))
    Slim.fit(alone, old, others)
    first = Slim.from_block(old, data.stack, ratio=1.0)
    Slim.fit(first, old, data)
    systems = len(data.systems)
    Slim.fit(shared, old, data)
    assert len(data.systems) == systems, "all heads stay in both: nothing was summed up again"
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), shared.parameters(), strict=True))


def test_a_gram_matrix_is_the_product_and_symmetric() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 900)
    system = Ridge(900, 1, bias=False, device=x.device)
    system.add(x, torch.zeros(50, 1), torch.ones(50, 1))
    found = system.sums[:-1, :900]
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
