"""Blocks below the lowest edit that are the teacher's still are not refitted, and those above come out the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iskd.models import Stack, surgery
from iskd.plan import Convert, Edit, Record, Remove
from iskd.refits import RefitTask
from iskd.refits import walk as walking
from iskd.refits.local import Local
from iskd.refits.output import Output
from iskd.refits.walk import BlockRefit, walk
from tests.factories import digest, louder, mixer_specs, tiny, windows

TEXT = list(windows(20, 16, seed=5).split(4))
REFITS: dict[str, BlockRefit] = {
    "output": Output(),
    "mlp": Output(projections=("mlp",)),
    "local": Local(lr=1e-3, epochs=1),
    "sublayers": Local(lr=1e-3, epochs=1, sublayers=True),
}
CUT = (Remove(4),)


def task(edits: Sequence[Edit] = CUT, family: str = "llama", **others: Any) -> RefitTask:
    teacher: Any = louder(tiny(family, layers=6))
    student = copy.deepcopy(teacher)
    record = surgery.apply(student, Record(6), edits)
    return RefitTask(student, teacher, record, edits, TEXT[:3], TEXT, **others)


def precision(name: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if name == "bf16" else nullcontext()


def moved(given: RefitTask) -> list[int]:
    """Layers whose blocks are no longer the teacher's."""
    ours, theirs = Stack(given.student).layers, Stack(given.teacher).layers
    pairs = [(layer, block, theirs[layer]) for layer, block in zip(given.record.layers, ours, strict=True)]
    return [
        layer
        for layer, block, old in pairs
        if not all(map(torch.equal, block.state_dict().values(), old.state_dict().values()))
    ]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize(
    ("name", "family"), [*((name, "llama") for name in REFITS), ("output", "gpt_neox"), ("local", "gemma2")]
)
def test_blocks_below_the_lowest_cut_stay(name: str, family: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit; those above are what a walk makes of them that runs every block of both models."""
    given = task(family=family)
    with precision(dtype):
        told = REFITS[name].refit(given)
    assert moved(given)
    assert set(moved(given)) <= {3, 5}
    assert re.search(r"\b2 blocks ", told[0]), "no line counts the others"
    assert told[-1] == "layers 0-2 are the teacher's still, and stay so"
    monkeypatch.setattr(walking, "_untouched", lambda *_: False)
    slow = task(family=family)
    with precision(dtype):
        above = copy.copy(REFITS[name])
        object.__setattr__(above, "blocks", "above")
        above.refit(slow)
    assert digest(given.student) == digest(slow.student)


@torch.no_grad()
def test_of_the_student_the_first_batch_runs_alone() -> None:
    given = task()
    ran: list[str] = []
    for name, model in (("student", given.student), ("teacher", given.teacher)):
        for position, block in enumerate(Stack(model).layers):
            block.register_forward_hook(lambda *_, key=f"{name} {position}": ran.append(key))
    REFITS["mlp"].refit(given)
    assert [ran.count(f"student {position}") for position in (1, 2)] == [1, 1]
    assert [ran.count(f"teacher {position}") for position in (1, 2, 3, 4, 5)] == [len(given.batches)] * 5


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "local"])
@pytest.mark.parametrize("trained", [0, 1])
def test_a_student_that_was_trained_is_refitted_from_there(name: str, trained: int) -> None:
    given = task()
    weight = Stack(given.student).layers[trained].get_submodule("mlp.down_proj").get_parameter("weight").mul_(1.1)
    before = weight.clone()
    told = REFITS[name].refit(given)
    assert torch.equal(weight, before) == (name == "local"), "whose one epoch makes it no better"
    assert re.search(rf"\b{5 - trained} blocks ", told[0])
    assert (told[-1] == "layers 0 are the teacher's still, and stay so") == (trained == 1)


@torch.no_grad()
def test_what_enters_the_first_block_counts_on_all_text() -> None:
    given = task()
    last = {*TEXT[-1].flatten().tolist()} - {*torch.cat(TEXT[:-1]).flatten().tolist()}
    given.student.get_input_embeddings().get_parameter("weight")[max(last)] += 1.0
    assert [site.layer for site in walk(given)] == [0, 1, 2, 3, 5]


@torch.no_grad()
@pytest.mark.parametrize(
    ("edits", "sites"),
    [
        ((), []),
        ((Remove(4),), [3, 5]),
        ((Remove(0),), [1, 2, 3, 4, 5]),
        ((Convert(1, mixer_specs()["window"], seed=3), Remove(4)), [1, 2, 3, 5]),
    ],
)
def test_what_was_edited_is_refitted_whatever_it_gives(
    edits: Sequence[Edit], sites: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the first batch a window may miss nothing of short documents, and so a mixer may give what attention did."""
    given = task(edits)
    if 0 not in given.record.edited:
        monkeypatch.setattr(walking, "_same", lambda *_: True)
    assert [site.layer for site in walk(given)] == sites
    independent = [site.layer for site in walk(given, independent=True)]
    assert independent == list(given.record.layers), "on the teacher's stream no block waits for another"


@torch.no_grad()
@pytest.mark.parametrize("disagrees", [0, 1, 2])
def test_processes_agree(disagrees: int) -> None:
    """A block that another process finds changed is refitted here too, and so are all above; nobody is asked again."""
    asked: list[bool] = []

    def gather(value: bool) -> list[bool]:
        asked.append(value)
        return [value, len(asked) <= disagrees]

    ranks: Any = SimpleNamespace(rank=0, size=2, gather=gather)
    assert [site.layer for site in walk(task(ranks=ranks))] == [0, 1, 2, 3, 5][max(disagrees - 1, 0) :]
    assert asked == [True] * (disagrees + 1)
