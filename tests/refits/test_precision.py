"""Normal equations are made and solved in whole float32 under a bf16 autocast too, given the same inputs."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from iskd.models import Stack, surgery
from iskd.models.block_calls import BlockCalls
from iskd.plan import Convert, Edit, Record, Remove, Spec
from iskd.refits import Refit, RefitTask
from iskd.refits.output import Output
from iskd.refits.projections import MIXER_OUT, Projection
from iskd.refits.replaceme import ReplaceMe
from iskd.refits.values import Values, _Linear
from iskd.refits.walk import walk
from tests.factories import louder, tiny, windows

TEXT = list(windows(24, 16, seed=5).split(4))
MIXERS = {
    "sliding": Spec("iskd.mixers.sliding.Sliding", {"window": 3, "sinks": 1}),
    "linear_attention": Spec("iskd.mixers.linear_attention.LinearAttention", {}),
}


def task(edit: Edit) -> RefitTask:
    teacher: Any = louder(tiny("llama"))
    student = copy.deepcopy(teacher)
    record = surgery.apply(student, Record(4), [edit])
    return RefitTask(student, teacher, record, [edit], TEXT[:4], TEXT[4:])


def autocast(on: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


@pytest.fixture
def blocks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a refit reads does not hang on autocast, and what it makes of that may not either."""
    original = BlockCalls.run

    def run(self: BlockCalls, position: int, block: torch.nn.Module, h_BTD: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return original(self, position, block, h_BTD)

    monkeypatch.setattr(BlockCalls, "run", run)


@torch.no_grad()
@pytest.mark.usefixtures("blocks_in_float32")
@pytest.mark.parametrize(
    ("refit", "edit"),
    [
        (Output(projections=("mlp",), blocks="gaps"), Remove(1)),
        (Output(projections=("attention",), blocks="gaps"), Convert(0, MIXERS["sliding"], seed=3)),
        (Output(projections=("mlp",), blocks="gaps", folds=2), Remove(1)),
        (ReplaceMe(ridge=1e-3), Remove(1)),
    ],
)
def test_solutions_do_not_hang_on_autocast(refit: Refit, edit: Edit) -> None:
    found = []
    for on in (False, True):
        given = task(edit)
        before = [parameter.clone() for parameter in Stack(given.student).layers[0].parameters()]
        with autocast(on):
            refit.refit(given)
        found.append([parameter.clone() for parameter in Stack(given.student).layers[0].parameters()])
        assert not all(map(torch.equal, before, found[-1]))
    assert all(map(torch.equal, *found))


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_values_do_not_hang_on_autocast(name: str) -> None:
    found = []
    for on in (False, True):
        given = task(Convert(0, MIXERS[name], seed=3))
        site = next(iter(walk(given, attention=True)))
        mixer: Any = site.submodule(f"{site.stack.family.attn}.mixer")
        out = Projection.at(site, f"{site.stack.family.attn}.{MIXER_OUT}")
        assert out is not None
        before = mixer.projections.get_submodule("v_proj").weight.clone()
        linear = _Linear(given, site, mixer, out, "device")
        with autocast(on):
            told = Values()._solve(given, linear, 0, [])
        after = mixer.projections.get_submodule("v_proj").weight.clone()
        assert not torch.equal(before, after)
        found.append((after, told))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
