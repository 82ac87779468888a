"""The survivors are refitted after every kind of edit: around each compact block, and under each mixer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from iskd.models import Stack, surgery
from iskd.models.hosting import HostedBlock
from iskd.plan import Convert, Edit, Record, Replace, Spec
from iskd.refits import RefitTask, refit_survivors
from iskd.refits.local import Local
from iskd.refits.output import Output
from tests.factories import BEHIND, FAMILIES, block_specs, hooks, louder, mixer_specs, text_of, tiny, windows

BOTH = Output(tokens=160, held_tokens=64, folds=2, projections=("attention", "mlp"))
BLOCKS, MIXERS = block_specs(), mixer_specs()
CASES: dict[str, tuple[str, Edit]] = {
    **{name: ("llama", Replace(1, spec, seed=3)) for name, spec in BLOCKS.items()},
    **{name: ("llama", Convert(1, spec, seed=3)) for name, spec in MIXERS.items()},
    **{f"granite {name}": ("granite", Replace(1, BLOCKS[name], seed=3)) for name in ("linear", "bottleneck")},
    **{
        f"{family} gla": (family, Convert(1, MIXERS["gla"], seed=3))
        for family in FAMILIES
        if family not in ("llama", *BEHIND)
    },
}


def has(block: nn.Module, path: str) -> bool:
    return path in dict(block.named_modules())


@pytest.mark.parametrize("name", CASES)
def test_no_survivor_is_left_out(name: str) -> None:
    """Of every block from the edited one on all output projections are solved, a mixer's own too.

    Blocks that have none are named, and so is the one below, which is the teacher's still.
    """
    family, edit = CASES[name]
    teacher = louder(tiny(family))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [edit])
    stack = Stack(made)
    ids = windows(14, 16, seed=5)
    told = refit_survivors([BOTH], made, teacher, record, [edit], text_of([ids], BOTH))
    foreign = isinstance(stack.layers[1], HostedBlock)
    own = getattr(stack.layers[1].block, "adds", None) if foreign else None
    paths = {stack.family.down: 2 if foreign else 3, stack.family.out: 3}
    if foreign or isinstance(edit, Convert) or not has(stack.layers[1], stack.family.out):
        paths[stack.family.out] = 2
    if isinstance(edit, Convert):
        paths[f"{stack.family.attn}.mixer.projections.o_proj"] = 1
    if own is not None:
        paths[f"block.{own}"] = 1
    for path, count in paths.items():
        assert any(line.startswith(f"refit output: {path} of {count} blocks re-solved") for line in told), told
    assert ("refit output: nothing to re-solve in layers [1]" in told) == (foreign and own is None)
    assert "refit output: layers 0 are the teacher's still, and stay so" in told
    before, after = (float(word) for word in told[-1].split("KL ")[1].split(" in ")[0].split(" -> "))
    assert after <= before or "taken back" in told[-1]
    for line in told:
        if "error on text left out" in line:
            error, solved = (float(word) for word in line.split("left out ")[1].split(",")[0].split(" -> "))
            assert solved <= error, line
    assert hooks(made) == hooks(teacher) == 0
    assert not any("forward" in vars(module) for module in made.modules()), (
        "an attention's forward is its class's again"
    )


NO_MAP = Spec(BLOCKS["tokenwise"].target, {**BLOCKS["tokenwise"].kwargs, "linear": False})


@pytest.mark.parametrize("inputs", ["student", "teacher"])
@pytest.mark.parametrize("sublayers", [False, True])
@pytest.mark.parametrize("name", [*BLOCKS, "no map"])
def test_blocks_are_trained_around_and_in_every_compact_block(name: str, sublayers: bool, inputs: str) -> None:
    """All weights of each; a block that has none is named, and one with nothing before its MLP is trained whole."""
    edit = Replace(1, BLOCKS.get(name, NO_MAP), seed=3)
    teacher = louder(tiny("llama"))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [edit])
    before = {key: parameter.clone() for key, parameter in Stack(made).layers[1].named_parameters()}
    refit = Local(tokens=160, held_tokens=64, epochs=1, lr=1e-3, sublayers=sublayers, inputs=inputs, blocks="gaps")
    with torch.no_grad():
        fit, held = windows(10, 16, seed=5), windows(4, 16, seed=6)
        told = refit.refit(RefitTask(made, teacher, record, [edit], fit.split(5), [fit, held]))
    after = dict(Stack(made).layers[1].named_parameters())
    assert before.keys() == after.keys()
    if before:
        assert told[0].startswith("1 blocks trained, ")
        assert not any(torch.equal(before[key], after[key]) for key in before)
    else:
        assert told == ["no block to train", "nothing to train in layers [1]"]
    assert hooks(made) == hooks(teacher) == 0
    assert all(parameter.requires_grad and parameter.grad is None for parameter in made.parameters())
