"""Laws of Muon: orthogonal steps of AdamW's size on the matrices of blocks, AdamW elsewhere, state as with AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.models import Stack, surgery
from iskd.plan import Record, Remove, Replace, Stage
from iskd.training.step import OptimSpec, make_optimizer, regroup
from iskd.training.step.muon import QUINTIC, MuonSpec, matrices, orthogonal
from iskd.training.step.optimizer import load_optimizer_tensors, optimizer_tensors
from tests.factories import tiny
from tests.runs import BOTTLENECK, SLIM
from tests.training.step.test_optimizer import step

FIRST = Stage("one", (Replace(1, BOTTLENECK, seed=1),))
SPEC = MuonSpec(weight_decay=0.1)


def student(family: str = "llama") -> tuple[PreTrainedModel, Record]:
    model = tiny(family)
    return model, surgery.apply(model, Record(4), FIRST.edits)


@pytest.mark.parametrize("shape", [(24, 24), (40, 9), (7, 64), (1, 5)])
def test_orthogonalised_as_the_singular_values_say(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iskd.training.step.muon.fast_bf16", lambda: False)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = sum(factor * s**power for factor, power in zip(QUINTIC, (1, 3, 5), strict=True))  # type: ignore[assignment]
    found = orthogonal(matrix, 5)
    torch.testing.assert_close(found.double(), u @ s.diag() @ vh, atol=1e-4, rtol=1e-3)
    assert 0.5 < float(torch.linalg.svdvals(found).min()) <= float(torch.linalg.svdvals(found).max()) < 1.3
    # neither size nor zeros matter
    torch.testing.assert_close(orthogonal(1e-6 * matrix, 5), found, atol=1e-4, rtol=1e-3)
    assert not orthogonal(torch.zeros(shape), 5).any()


def test_bf16_orthogonalises_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iskd.training.step.muon.fast_bf16", lambda: True)
    values = torch.linalg.svdvals(
        orthogonal(torch.randn(48, 16, generator=torch.Generator().manual_seed(0)), 5).float()
    )
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.3


def test_a_step_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iskd.training.step.muon.fast_bf16", lambda: True)  # as torch's always multiplies
    start = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    groups = {"name": "base", "decays": True, "orthogonal": True, "weight_decay": 0.1}
    one = SPEC.make([{"params": [ours], **groups}])
    other = torch.optim.Muon([theirs], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        gradient = torch.randn(12, 30, generator=torch.Generator().manual_seed(seed))
        for parameter, optimizer in ((ours, one), (theirs, other)):
            optimizer.param_groups[0]["lr"], parameter.grad = 0.02, gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)  # three steps of 4e-3, in bf16 both


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_matrices_of_blocks_step_orthogonally_and_all_else_as_with_adamw(family: str) -> None:
    found, rates = [], 1e-2
    for spec in (SPEC, OptimSpec(weight_decay=0.1)):
        model, record = student(family)
        optimizer = make_optimizer(spec)
        regroup(optimizer, model, record, FIRST, {})
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, optimizer)
        found.append(model)
    ours, theirs = (dict(model.named_parameters()) for model in found)
    blocks, stepped = matrices(found[0]), 0
    embedding = found[0].get_input_embeddings().weight
    assert id(embedding) not in blocks
    for name, parameter in ours.items():
        if id(parameter) not in blocks:
            torch.testing.assert_close(parameter, theirs[name], atol=1e-6, rtol=1e-5)
        elif parameter.grad is not None and parameter.grad.any():
            moved = parameter.detach() - before[name] * (1 - rates * 0.1)
            size = moved.square().mean().sqrt() / rates  # AdamW's first step has 1, Muon's of full rank about 0.2
            assert 0.2 * 0.5 < size < 0.2 * 1.3, name
            stepped += 1
    assert stepped > 3 * len(Stack(found[0]).layers)


def test_a_skipped_step_changes_nothing() -> None:
    model, record = student()
    optimizer = make_optimizer(SPEC)
    regroup(optimizer, model, record, FIRST, {})
    step(model, optimizer)
    state = {key: value.clone() for key, value in optimizer_tensors(optimizer, model).items()}
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = optimizer_tensors(optimizer, model)
    assert all(torch.equal(value, after[key]) for key, value in state.items())


def test_an_edit_keeps_state_and_a_restored_optimizer_takes_the_same_step() -> None:
    one, record = student()
    first = make_optimizer(SPEC)
    regroup(first, one, record, FIRST, {})
    step(one, first)
    kept = {id(p): state for p, state in first.state.items()}
    second = Stage("two", (Remove(2), Replace(0, SLIM)))
    record = surgery.apply(one, record, second.edits)
    regroup(first, one, record, second, {})
    assert {id(p) for p in first.state} == kept.keys() & {id(p) for p in one.parameters()}
    assert all(state is kept[id(p)] for p, state in first.state.items())
    step(one, first, 1)
    tensors = {key: value.clone() for key, value in optimizer_tensors(first, one).items()}
    assert {key.partition("/")[0] for key in tensors} == {"momentum", "step", "exp_avg", "exp_avg_sq"}
    other = surgery.rebuild(tiny("llama"), record)
    other.load_state_dict(one.state_dict())
    again = make_optimizer(SPEC)
    regroup(again, other, record, second, {})
    load_optimizer_tensors(again, other, tensors)
    for model, optimizer in ((one, first), (other, again)):
        model.eval()
        step(model, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    # the state of one kind for a parameter of the other, and for an optimizer without that kind
    name = next(n for n, p in other.named_parameters() if id(p) in matrices(other))
    moments = {f"{slot}/{name}": tensors[f"momentum/{name}"] for slot in ("exp_avg", "exp_avg_sq")}
    swapped = {key: value for key, value in tensors.items() if not key.endswith(name)} | moments
    with pytest.raises(ValueError, match=f"the optimizer state of '{name}' is not whole"):
        load_optimizer_tensors(again, other, swapped | {f"step/{name}": torch.ones(())})
    with pytest.raises(ValueError, match="is none of AdamW's"):
        load_optimizer_tensors(make_optimizer(OptimSpec()), other, tensors)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"momentum": 1.0}, r"optim.momentum must be in \[0, 1\)"), ({"ns_steps": 0}, "optim.ns_steps must be in 1..20")],
)
def test_bad_values_are_refused(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonSpec(**kwargs)  # type: ignore[arg-type]
