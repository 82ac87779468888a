"""Laws of the warm start: a fit never hurts, finds what can be found, and touches nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.blocks.base import FitData, fit_error
from iskd.blocks.fitting import Fitted, warm_start
from iskd.blocks.linear import Linear
from iskd.blocks.ridge import Ridge
from iskd.models import Stack, surgery
from iskd.models.capture import Trace, capture
from iskd.plan import Edit, Record, Remove, Replace, Spec
from tests.factories import FAMILIES, block_specs, digest, hooks, modes, tiny, windows

SPECS = block_specs()
FITTED = {name: spec for name, spec in SPECS.items() if hasattr(spec.resolve(), "fit")}
LINEAR = Spec("iskd.blocks.linear.Linear", {"ridge": 1e-6})


def start(teacher: PreTrainedModel, *edits: Edit) -> tuple[PreTrainedModel, Record, dict[int, nn.Module]]:
    """A student after `edits`, its record, and the blocks that were replaced."""
    student = copy.deepcopy(teacher)
    record = Record(len(Stack(teacher).layers))
    old = dict(zip(record.layers, Stack(student).layers, strict=True))
    return student, surgery.apply(student, record, edits), old


def fitted(
    teacher: PreTrainedModel, edits: Sequence[Edit], batches: list[Tensor], held: Sequence[Tensor] = ()
) -> tuple[PreTrainedModel, list[Fitted]]:
    student, record, old = start(teacher, *edits)
    return student, warm_start(student, teacher, old, record, edits, batches, held)


@torch.no_grad()
def recomputed(student: PreTrainedModel, teacher: PreTrainedModel, position: int, batches: list[Tensor]) -> float:
    """The relative squared error of the state after one block, without the machinery of `warm_start`."""
    inputs, targets, traces = [], [], []
    for batch in batches:
        with capture(Stack(teacher), range(len(Stack(teacher).layers)), {position}) as states:
            teacher(batch)
        traces.append(Trace(Stack(student), batch, position))
        inputs.append(traces[-1].input)
        targets.append(states[position].float())
    data = FitData(inputs, targets, lambda block, h, i: traces[i].run(position, block, h), Stack(student))
    return fit_error(Stack(student).layers[position], data)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FITTED)
def test_a_fit_never_hurts(family: str, name: str) -> None:
    teacher, (*batches, held) = tiny(family), [windows(4, 16, seed=seed) for seed in range(4)]
    student, results = fitted(teacher, [Replace(2, SPECS[name]), Replace(0, SPECS[name])], batches, [held])
    assert [result.layer for result in results] == [0, 2]
    assert all(0 <= result.after <= result.before for result in results), "what is farther on text held out is no fit"
    assert results[0].after == pytest.approx(recomputed(student, teacher, 0, [held]), rel=1e-4)
    alone, [first] = fitted(teacher, [Replace(0, SPECS[name])], batches, [held])
    if first.after == first.before:
        assert digest(alone) == digest(start(teacher, Replace(0, SPECS[name]))[0]), "and is taken back"


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_brings_the_student_closer_to_a_teacher_that_has_learnt(
    teacher: PreTrainedModel, said: list[Tensor], name: str
) -> None:
    edits = [Replace(2, block_specs(reduction=4, fit_steps=20)[name])]
    student, _ = fitted(teacher, edits, said[:3])
    unfitted = start(teacher, *edits)[0]
    with torch.no_grad():
        goal, before, after = (model(said[3]).logits.log_softmax(-1) for model in (teacher, unfitted, student))

    def kl(guess: Tensor) -> Tensor:
        return nn.functional.kl_div(guess, goal, log_target=True, reduction="batchmean")

    assert kl(after) < 0.9 * kl(before)


class Planted(nn.Module):
    """A block of the teacher that is exactly what a linear block can be."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(48, 48)
        nn.init.normal_(self.map.weight, std=0.3)
        nn.init.normal_(self.map.bias, std=0.3)

    def forward(self, h_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
        return h_BTD + self.map(nn.functional.rms_norm(h_BTD, (48,), eps=1e-6))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exactly_linear_block_is_recovered(family: str) -> None:
    teacher = tiny(family)
    torch.manual_seed(0)
    planted = Planted()
    blocks = list(Stack(teacher).layers)
    Stack(teacher).set_layers([blocks[0], planted, *blocks[2:]])
    batches = [windows(8, 32, seed=seed) for seed in range(2)]
    student, [result] = fitted(teacher, [Replace(1, LINEAR)], batches)
    assert result.after < 1e-4 < result.before
    assert recomputed(student, teacher, 1, [windows(4, 32, seed=9)]) < 1e-4
    found = Stack(student).layers[1].get_submodule("block.map").get_parameter("weight")
    assert (found - planted.map.weight).norm() < 0.05 * planted.map.weight.norm()


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("training", [True, False])
def test_a_warm_start_leaves_everything_else_alone(name: str, training: bool) -> None:
    teacher = tiny("qwen3", dropout=0.5)
    student, record, old = start(teacher, edit := Replace(1, SPECS[name]))
    student.train(training)
    # one frozen module in another mode than its model
    Stack(student).layers[3].eval()
    others = [digest(block) for i, block in enumerate(Stack(student).layers) if i != 1]
    objects = [id(p) for p in student.parameters()]
    before = modes(student), modes(teacher), hooks(student), hooks(teacher), digest(teacher), digest(old[1])
    required = [p.requires_grad for p in student.parameters()]
    state = torch.get_rng_state()
    warm_start(student, teacher, old, record, [edit], [windows()])
    assert (modes(student), modes(teacher), hooks(student), hooks(teacher), digest(teacher), digest(old[1])) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [digest(block) for i, block in enumerate(Stack(student).layers) if i != 1] == others
    assert [id(p) for p in student.parameters()] == objects
    assert [p.requires_grad for p in student.parameters()] == required
    assert all(p.grad is None for model in (student, teacher, old[1]) for p in model.parameters())


@pytest.mark.parametrize("name", FITTED)
def test_dropout_has_no_part_in_a_fit(name: str) -> None:
    teacher, edit = tiny("gpt2", dropout=0.5), Replace(1, FITTED[name])
    plain, record, old = start(teacher, edit)
    noisy, _, dropping = start(teacher, edit)
    for model in (noisy, *dropping.values()):
        model.train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pairs = ((plain, old), (noisy, dropping))
    results = [warm_start(student, teacher, blocks, record, [edit], [windows()]) for student, blocks in pairs]
    assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]
    assert digest(plain) == digest(noisy)
    assert all(all(modes(block)) for block in dropping.values())


def test_modes_and_hooks_come_back_after_an_exception() -> None:
    teacher = tiny("llama")
    student, record, old = start(teacher, edit := Replace(1, SPECS["slim"]))
    student.train()
    before = modes(student)
    with pytest.raises(IndexError):
        warm_start(student, teacher, old, record, [edit], [torch.tensor([[5000]])])
    assert modes(student) == before
    assert hooks(student) == hooks(teacher) == 0
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_fit_under_autocast_reports_what_is_there_afterwards(family: str, name: str) -> None:
    teacher, (*batches, held) = tiny(family), [windows(4, 16, seed=seed) for seed in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        student, [result] = fitted(teacher, [Replace(1, SPECS[name])], batches, [held])
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert result.after == pytest.approx(recomputed(student, teacher, 1, [held]), rel=1e-3)
    assert result.after < result.before
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_layers_of_one_stage_are_fitted_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, batches = tiny("llama", layers=5), [windows(4, 16)]
    seen: dict[int, FitData] = {}
    fit = Linear.fit

    def watched(new: nn.Module, old: nn.Module, data: FitData, ridge: float) -> None:
        seen[len(seen)] = replace(data, inputs=list(data.inputs), targets=list(data.targets))  # which go on
        fit(new, old, data, ridge)

    monkeypatch.setattr(Linear, "fit", staticmethod(watched))
    edits: list[Edit] = [Replace(1, LINEAR), Remove(2), Replace(3, LINEAR)]
    student, results = fitted(teacher, edits, batches)
    assert [result.layer for result in results] == [1, 3]
    with torch.no_grad():
        with capture(Stack(student), (0, 1, 3, 4), {0, 1}) as own:
            student(batches[0])
        with capture(Stack(teacher), range(5), {2, 3}) as goal:
            teacher(batches[0])
    # inputs: the student's stream, which already went through the fitted block; targets: the teacher's, across the gap
    assert torch.equal(seen[0].inputs[0], own[0])
    assert torch.equal(seen[0].targets[0], goal[2])
    assert torch.equal(seen[1].inputs[0], own[1])
    assert torch.equal(seen[1].targets[0], goal[3])
    # what the teacher's own blocks give there: the same below the first edit, and nobody's state above it
    assert seen[0].own is None
    with torch.no_grad():
        trace = Trace(Stack(teacher), batches[0], 3)
        expected = trace.run(3, Stack(teacher).layers[3], own[1])
    assert seen[1].own is not None
    torch.testing.assert_close(seen[1].own[0], expected)
    assert not torch.equal(expected, goal[3])


def test_nothing_to_fit_is_no_work() -> None:
    teacher = tiny("llama")
    edits: list[Edit] = [Replace(0, SPECS["identity"]), Remove(1)]
    student, record, old = start(teacher, *edits)
    untouched = digest(student)
    assert warm_start(student, teacher, old, record, edits, [windows()]) == []
    student, record, old = start(teacher, edit := Replace(0, SPECS["linear"]))
    assert warm_start(student, teacher, old, record, [edit], []) == []
    assert digest(student) != untouched
    assert record.edits == (edit,)


def rows(bias: bool) -> tuple[Ridge, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    features, targets, weight = torch.randn(2, 40, 6), torch.randn(2, 40, 3), torch.rand(2, 40, 1) + 0.1
    system = Ridge(6, 3, bias=bias, device=torch.device("cpu"))
    for index in range(2):
        system.add(features[index], targets[index], weight[index])
    return system, features.view(80, 6), targets.view(80, 3), weight.view(80, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_without_ridge_it_is_weighted_least_squares(bias: bool) -> None:
    system, x, y, w = rows(bias)
    found, found_bias = system.solve(torch.randn(3, 6), torch.randn(3) if bias else None, 1e-12)
    x = torch.cat([x, torch.ones(80, 1)], dim=1) if bias else x
    reference = torch.linalg.lstsq(x * w, y * w).solution
    torch.testing.assert_close(found, reference[:6].T, atol=1e-5, rtol=1e-4)
    if bias:
        torch.testing.assert_close(found_bias, reference[6], atol=1e-5, rtol=1e-4)
    else:
        assert found_bias is None


@pytest.mark.parametrize("bias", [True, False])
def test_with_a_huge_ridge_it_is_the_prior(bias: bool) -> None:
    system, *_ = rows(bias)
    prior, prior_bias = torch.randn(3, 6), torch.randn(3) if bias else None
    found, found_bias = system.solve(prior, prior_bias, 1e12)
    torch.testing.assert_close(found, prior)
    torch.testing.assert_close(found_bias, prior_bias)


def test_the_solution_minimises_what_the_docstring_says() -> None:
    system, x, y, w = rows(bias=False)
    prior, ridge = torch.randn(3, 6), 0.3
    found, _ = system.solve(prior, None, ridge)

    def cost(weight: Tensor) -> Tensor:
        penalty = ridge * ((x * w).T @ (x * w)).diagonal().mean()
        return ((x @ weight.T - y) * w).square().sum() + penalty * (weight - prior).square().sum()

    found.requires_grad_()
    [gradient] = torch.autograd.grad(cost(found), found)
    assert gradient.abs().max() < 1e-3 * cost(found)


@pytest.mark.parametrize("bias", [True, False])
def test_errors_on_the_way_are_those_of_the_rows(bias: bool) -> None:
    system, x, y, w = rows(bias)
    start = system.start(torch.randn(3, 6), torch.randn(3) if bias else None)
    found, shares = system.solution(start, 0.3), [0.0, 0.25, 1.0]
    slow = []
    for share in shares:
        weights = found.towards(start, share)
        slow.append(((weights.of(x.double()) - y) * w).square().sum().item())
        assert system.error(weights) == pytest.approx(slow[-1], rel=1e-5)
    assert system.errors_from(start)(found, shares) == pytest.approx(slow, rel=1e-5)


def test_rows_that_are_not_finite_are_refused() -> None:
    system = Ridge(2, 2, bias=False, device=torch.device("cpu"))
    system.add(torch.full((3, 2), float("inf")), torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(
        ValueError, match=r"raise its ridge \(block.ridge, edit.ridge, .* or use more calibration tokens"
    ):
        system.solve(torch.zeros(2, 2), None, 1e-2)


def test_every_row_counts_by_the_size_of_its_target() -> None:
    target = torch.randn(1, 5, 4) * torch.tensor([100.0, 1, 2, 3, 0]).view(1, 5, 1)
    data = FitData([torch.zeros(1, 5, 4)], [target], lambda block, h, i: h, Stack(tiny("llama")))
    [(index, h, same, weight)] = list(data.rows())
    assert index == 0
    assert same is target
    assert torch.equal(h, data.inputs[0])
    torch.testing.assert_close((target * weight).norm(dim=-1)[0, :4], torch.ones(4))
    assert weight.isfinite().all()
    # a block that gives nothing is as wrong as the target is large: 1 for each of the four rows that are not zero
    assert fit_error(nn.Identity(), data) == pytest.approx(4 / 5)
