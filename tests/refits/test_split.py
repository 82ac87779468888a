"""How the text of a refit is shared out: every window once, in the same fold for any number of processes, evenly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from iskd.plan import Record, Remove, Stage
from iskd.refits import RefitTask, magnitude
from iskd.refits.calibrate import Calibrate
from iskd.refits.local import Local
from iskd.refits.output import Output
from iskd.refits.reading import for_stage, split, texts_of
from iskd.system import Ranks
from tests.factories import louder, tiny, windows

LENGTHS, SIZES, FOLDS = (256, 512, 1024, 2048, 4096), (1, 2, 3, 5, 6, 8, 16), (1, 3)


def shares(windows: int, length: int, size: int, folds: int) -> list[tuple[list[Tensor], list[int], list[Tensor]]]:
    """What each rank gets; windows hold their own numbers."""
    text = [torch.arange(windows)[:, None].expand(-1, length)]
    ranks: list[Any] = [SimpleNamespace(size=size, rank=rank) for rank in range(size)]
    return [split(text, Output(folds=folds), rank) for rank in ranks]


def numbers(batches: list[Tensor]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_rank_has_as_many_batches_of_each_kind(length: int) -> None:
    """In shards every pass is a collective. The default's text, and texts that are a little shorter."""
    whole = 40_960 // length
    for count, size, folds in product(range(max(whole - 2, 2), whole + 1), SIZES, FOLDS):
        try:
            found = shares(count, length, size, folds)
        except ValueError:
            assert round(count / 5) < size, "only where a rank would have no window held out or none to fit to"
            continue
        where = (count, size, folds)
        assert len({(tuple(fold_of), len(held)) for _, fold_of, held in found}) == 1, where
        assert all(len(batch) for fit, _, held in found for batch in (*fit, *held)), where
        rows = max(1, 2048 // length)
        sizes = [len(batch) for fit, _, held in found for batch in (*fit, *held)]
        assert max(sizes) <= max(rows, 2), where


@pytest.mark.parametrize("window", [512, 4096])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_share_of_the_text_leaves_every_refit_windows_to_fit_to_and_to_judge_by(size: int, window: int) -> None:
    """Calibrate asks for 4 windows of each, or none of 4,096: of a share as little as one for every process."""
    refits = [Calibrate(tokens=2048, held_tokens=2048), Output(tokens=8192, held_tokens=1024), Local(inputs="teacher")]
    ranks: list[Any] = [SimpleNamespace(size=size, rank=rank) for rank in range(size)]
    for stage in (Stage("x", refit_share=0.02), Stage("x", refit_budget=100)):
        found = for_stage(refits, stage, window, ranks[0], sharded=False)
        assert [(refit.tokens, refit.held_tokens) for refit in found[:2]] == [(window * size,) * 2] * 2
        local = max(655, window) if stage.refit_share < 1 else window
        assert (found[2].tokens, found[2].held_tokens) == (local, window), "layers are shared out: each reads all of it"
        texts = texts_of(found, lambda tokens: [torch.zeros(max(1, tokens // window), window)])
        for part, one in zip(texts[:2], found[:2], strict=True):
            for rank in ranks:
                fit, _, held = split(part, one, rank)
                assert fit
                assert held
    assert for_stage(refits, Stage("x", refit_share=0), window, ranks[0], sharded=False) == []
    assert for_stage(refits, Stage("x"), window, ranks[0], sharded=False) == refits, "what is asked for is asked for"


def test_all_refits_of_an_edit_read_parts_of_one_text() -> None:
    asked: list[int] = []

    def text(tokens: int) -> list[Tensor]:
        asked.append(tokens)
        return list(torch.arange(min(40, tokens // 16))[:, None].expand(-1, 16).split(4))

    refits = [Output(tokens=96, held_tokens=32), Local(tokens=320, held_tokens=160), Output(tokens=1, held_tokens=1)]
    small, large, least = [sorted(numbers(part)) for part in texts_of(refits, text)]
    assert asked == [480]
    assert large == list(range(30))
    assert len(small) == 8
    assert {*small, *least} <= {*large}
    assert len(least) == 1
    assert max(small) > 24, "from all over it"
    assert [numbers(part) for part in texts_of([refits[0]], text)] == [list(range(8))]
    assert texts_of(refits, lambda _: []) == [[], [], []]


@pytest.mark.parametrize(("windows", "size", "folds"), [(21, 3, 1), (45, 2, 3), (37, 5, 2), (20, 2, 1), (50, 8, 1)])
def test_every_window_has_the_place_that_one_process_gives_it(windows: int, size: int, folds: int) -> None:
    def places(size: int) -> list[tuple[int, int]]:
        found = []
        for fit, fold_of, held in shares(windows, 1024, size, folds):
            found += [(number, fold) for batch, fold in zip(fit, fold_of, strict=True) for number in numbers([batch])]
            found += [(number, -1) for number in numbers(held)]
        return sorted(found)

    assert [number for number, _ in places(1)] == list(range(windows))
    assert places(size) == places(1)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_step_of_training_has_the_same_windows_in_any_number_of_processes(size: int) -> None:
    """Of `step_tokens`; only where these are fewer windows than processes has a step one for each."""
    for count in (37, 80):
        ranks: list[Any] = [SimpleNamespace(size=size, rank=rank) for rank in range(size)]
        text = [torch.arange(count)[:, None].expand(-1, 512)]
        (alone, *_), *others = (split(text, Local(step_tokens=2048), rank) for rank in (Ranks(), *ranks))
        steps = [sorted(numbers(list(shares))) for shares in zip(*(fit for fit, *_ in others), strict=True)]
        assert all(len(step) in ((3, 4) if size < 4 else range(size, 2 * size)) for step in steps)
        assert size > 4 or steps == [numbers([batch]) for batch in alone]


@torch.no_grad()
@pytest.mark.parametrize("statistic", ["norm", "mean_abs"])
def test_scalars_do_not_depend_on_the_number_of_processes(statistic: str) -> None:
    """Three processes of unequal text stand here one after the other, each hearing what all say."""
    teacher: Any = louder(tiny("llama"))
    record = Record(4).extended([Remove(2)])
    text = list(windows(7, 16, seed=5).split(1))

    def scalars(batches: Sequence[Tensor], ranks: Any) -> dict[int, float]:
        task = RefitTask(teacher, teacher, record, [Remove(2)], batches, [], ranks=ranks)
        return magnitude._scalars(task, [2], statistic)

    said: list[Any] = []
    shares = [text[:4], text[4:6], text[6:]]
    for batches in shares:
        alone: Any = SimpleNamespace(
            size=1, gather=lambda x: (said.append(x), [x])[1], add=lambda x: said.append(x.clone())
        )
        scalars(batches, alone)
    together: Any = SimpleNamespace(size=3, gather=lambda _: said, add=lambda x: x.copy_(torch.stack(said).sum(0)))
    assert scalars(shares[0], together) == pytest.approx(scalars(text, Ranks()), rel=1e-6)
