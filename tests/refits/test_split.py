"""How the text of a refit is shared out: every window once, in the same fold for any number of processes, evenly."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from iskd.refits.carrying_out import split
from iskd.refits.output import Output

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
    for windows, size, folds in product(range(max(whole - 2, 2), whole + 1), SIZES, FOLDS):
        try:
            found = shares(windows, length, size, folds)
        except ValueError:
            assert round(windows / 5) < size, "only where a rank would have no window held out or none to fit to"
            continue
        where = (windows, size, folds)
        assert len({(tuple(fold_of), len(held)) for _, fold_of, held in found}) == 1, where
        assert all(len(batch) for fit, _, held in found for batch in (*fit, *held)), where
        rows = max(1, 2048 // length)
        sizes = [len(batch) for fit, _, held in found for batch in (*fit, *held)]
        assert max(sizes) <= max(rows, 2), where


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
