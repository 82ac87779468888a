"""Every mixer learns one batch by heart, from the loss of the text and from each alignment objective."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from iskd.models import surgery
from iskd.plan import Convert, Record, Stage
from iskd.plan.stage import OBJECTIVES
from iskd.training.step import OptimSpec, make_optimizer, regroup
from iskd.training.step.alignment import align
from tests.factories import mixer_specs, tiny, windows

SPECS = mixer_specs()
# tests/training/step/test_alignment.py holds what is said of a mixer without a matrix
ALIGNED = [
    (name, objective)
    for name, spec in SPECS.items()
    for objective in OBJECTIVES[1:]
    if objective != "matrix" or getattr(spec.resolve(), "exposes_matrix", False)
]


@pytest.mark.parametrize("name", SPECS)
def test_one_batch_is_learnt_by_heart(name: str) -> None:
    """Every other token is the same, so whoever sees only the present token is left with log(6) / 2 = 0.9 nats."""
    model, ids = tiny("llama", layers=1), windows(1, 13, seed=5)
    ids[:, ::2] = 7
    surgery.apply(model, Record(1), [Convert(0, SPECS[name])])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        if loss.item() < 0.5:
            return
        loss.backward()
        optimizer.step()
    pytest.fail(f"after 100 steps the loss is {loss.item():.2f}")


@pytest.mark.parametrize(("name", "objective"), ALIGNED)
def test_one_batch_is_aligned_by_heart(name: str, objective: str) -> None:
    """From random projections: copied ones are close already, where a random teacher's attention is almost flat."""
    teacher, ids = tiny("llama", layers=1, initializer_range=0.2), windows(2, 12)
    student, spec = copy.deepcopy(teacher).train(), SPECS[name]
    record = surgery.apply(student, Record(1), [Convert(0, replace(spec, kwargs={**spec.kwargs, "init": "random"}))])
    optimizer = make_optimizer(OptimSpec())
    regroup(optimizer, student, record, Stage("a", record.edits, 10, train="edited", objective=objective), {})
    for group in optimizer.param_groups:
        group["lr"] = 2e-2
    first = align(objective, student, teacher, record, ids).loss.item()
    for _ in range(40):
        loss = align(objective, student, teacher, record, ids).loss
        if loss.item() < 0.6 * first:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"after 40 steps {objective} is {loss.item():.3g}, {first:.3g} at first")
