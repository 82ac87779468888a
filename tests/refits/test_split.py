"""How the text of a refit is shared out: every window once, in the same fold for any number of processes, evenly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from iskd.refits.reading import for_stage, split
from iskd.system import Ranks
from iskd.training.editing import Editor
from tests.factories import louder, text_of, tiny, windows

LENGTHS, SIZES, FOLDS = (256, 512, 1024, 2048, 4096), (1, 2, 3, 5, 6, 8, 16), (1, 3)


def shares(windows: int, length: int, size: int, folds: int) -> list[tuple[list[Tensor], list[int], list[Tensor]]]:
    """What each rank gets; windows hold their own numbers."""
    text = text_of([torch.arange(windows)[:, None].expand(-1, length)], Output(), least=size)
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
        text = Editor(refits, lambda tokens: [torch.zeros(max(1, tokens // window), window)], window=window).text(
            ranks[0]
        )
        for one in found[:2]:
            for rank in ranks:
                fit, _, held = split(text, one, rank)
                assert fit
                assert held
    assert for_stage(refits, Stage("x", refit_share=0), window, ranks[0], sharded=False) == []
    assert for_stage(refits, Stage("x"), window, ranks[0], sharded=False) == refits, "what is asked for is asked for"


def numbered(count: int, length: int) -> Callable[[int], list[Tensor]]:
    """Windows that hold their own numbers, evenly from all over a text of so many, as a run draws them."""

    def windows(tokens: int) -> list[Tensor]:
        few = min(count, max(1, tokens // length))
        return list((torch.arange(few) * count // few)[:, None].expand(-1, length).split(4))

    return windows


@pytest.mark.parametrize("count", [2, 3, 7, 40, 1000])
@pytest.mark.parametrize("fit_tokens", [0, 48, 400, 4096])
@pytest.mark.parametrize("size", [1, 2])
def test_no_window_that_judges_is_fitted_to_by_anyone_in_a_run(count: int, fit_tokens: int, size: int) -> None:
    """Fits of blocks, refits of any size, the same in a stage that reads a share of its text, steps of a mix."""
    refits = [Output(tokens=96, held_tokens=32), Local(tokens=320, held_tokens=160), Output(tokens=32, held_tokens=160)]
    stages = [Stage("a", (Remove(1),), refit_share=share) for share in (1.0, 0.3)]
    ranks: list[Any] = [SimpleNamespace(size=size, rank=rank) for rank in range(size)]
    for by_step in ((), (refits[:1], refits[1:])):
        editor = Editor(refits, numbered(count, 16), by_step, window=16, fit_tokens=fit_tokens)
        fitted, judged = set[int](), set[int]()
        for stage, rank in product(stages, ranks):
            text = editor.text(rank)
            fits = editor.fit_text(stage, rank)
            fitted |= {*numbers([fits.fit])}
            judged |= {*numbers([fits.held])}
            for refit in for_stage(refits, stage, 16, rank, sharded=False):
                try:
                    fit, _, held = split(text, refit, rank)
                except ValueError:
                    assert count < 2 * size
                    continue
                fitted |= {*numbers(fit)}
                judged |= {*numbers(held)}
        assert not fitted & judged
        assert fitted or count < 2 * size
        assert judged or count < 2 * size


def test_all_refits_of_an_edit_read_parts_of_one_text() -> None:
    refits = [Output(tokens=96, held_tokens=32), Local(tokens=320, held_tokens=160), Output(tokens=1, held_tokens=1)]
    text = text_of(numbered(30, 16), *refits)
    small, large, least = ([sorted(numbers(part)) for part in split(text, refit, Ranks())[::2]] for refit in refits)
    assert sorted(large[0] + large[1]) == list(range(30))
    assert [len(part) for part in large] == [20, 10], "two of three tokens"
    assert [len(part) for part in small] == [6, 2]
    assert [len(part) for part in least] == [1, 1]
    for part, whole in product((0, 1), (small, least)):
        assert {*whole[part]} <= {*large[part]}
    assert max(small[0]) > 20, "from all over it"
    assert not text_of([], *refits)


def test_trials_are_judged_by_what_nothing_was_fitted_to() -> None:
    text = text_of([torch.arange(10)[:, None].expand(-1, 4)], Output(tokens=32, held_tokens=8))
    batches = [{"input_ids": torch.arange(10)[:, None].expand(-1, 4), "targets": torch.arange(10)[:, None]}]
    [found] = text.not_fitted(batches)
    assert found["input_ids"][:, 0].tolist() == found["targets"][:, 0].tolist() == sorted(numbers([text.held]))
    assert text.not_fitted([{"input_ids": text.fit}])[0]["input_ids"] is text.fit, "all, where no others are left"


@pytest.mark.parametrize(("windows", "size", "folds"), [(21, 3, 1), (39, 2, 3), (37, 5, 2), (20, 2, 1), (40, 8, 1)])
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
        text = text_of([torch.arange(count)[:, None].expand(-1, 512)], Local(), least=size)
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
