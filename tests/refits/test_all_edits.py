"""The survivors are re-solved after every kind of edit: around each compact block, and under each mixer."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from iskd.models import Stack, surgery
from iskd.models.hosting import HostedBlock
from iskd.plan import Convert, Edit, Record, Replace
from iskd.refits import refit_survivors
from iskd.refits.output import Output
from tests.factories import BEHIND, FAMILIES, block_specs, hooks, louder, mixer_specs, tiny, windows

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
    """Of every block all output projections are solved, a mixer's own too; blocks that have none are named."""
    family, edit = CASES[name]
    teacher = louder(tiny(family))
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [edit])
    stack = Stack(made)
    ids = windows(14, 16, seed=5)
    told = refit_survivors([BOTH], made, teacher, record, [edit], lambda _tokens: [ids])
    foreign = isinstance(stack.layers[1], HostedBlock)
    own = getattr(stack.layers[1].block, "adds", None) if foreign else None
    paths = {stack.family.down: 3 if foreign else 4, stack.family.out: 4}
    if foreign or isinstance(edit, Convert) or not has(stack.layers[1], stack.family.out):
        paths[stack.family.out] = 3
    if isinstance(edit, Convert):
        paths[f"{stack.family.attn}.mixer.projections.o_proj"] = 1
    if own is not None:
        paths[f"block.{own}"] = 1
    for path, count in paths.items():
        assert any(line.startswith(f"refit output: {path} of {count} blocks re-solved") for line in told), told
    assert ("refit output: nothing to re-solve in layers [1]" in told) == (foreign and own is None)
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
