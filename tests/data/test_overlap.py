"""Shared passages: all of the same text wherever windows begin, none of another, the slow count."""

from __future__ import annotations

import numpy as np
import pytest

from iskd.data import overlap
from iskd.data.overlap import seen_share

rng = np.random.default_rng(0)
TEXT = rng.integers(0, 50, 960).astype(np.uint16)


def slowly(windows: np.ndarray, others: np.ndarray, length: int) -> float:
    def passages(rows: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(row[i : i + length]) for row in rows.tolist() for i in range(len(row) - length + 1)]

    known = set(passages(others))
    wanted = passages(windows)
    return sum(passage in known for passage in wanted) / len(wanted)


@pytest.mark.parametrize(("length", "tokens"), [(13, 2), (13, 30), (3, 4), (2, 3)])
def test_it_is_the_slow_count(monkeypatch: pytest.MonkeyPatch, length: int, tokens: int) -> None:
    monkeypatch.setattr(overlap, "PASSAGE", length)
    monkeypatch.setattr(overlap, "_PIECE", 70)  # several pieces, the last one short
    ours, other = rng.integers(0, tokens, (9, 16)), rng.integers(0, tokens, (37, 24)).astype(np.uint16)
    assert seen_share(ours, [other[:11], other[11:]]) == slowly(ours, other, length)


def test_where_windows_begin_does_not_matter() -> None:
    assert seen_share(TEXT[5:485].reshape(-1, 16), [TEXT.reshape(-1, 960)]) == 1
    assert seen_share(TEXT.reshape(-1, 64), [rng.integers(50, 99, (9, 64))]) == 0
    half = np.concatenate([TEXT[:480], rng.integers(50, 99, 480)]).reshape(2, 480)
    assert seen_share(half, [TEXT.reshape(1, -1)]) == 0.5


def test_windows_shorter_than_a_passage_are_whole_passages() -> None:
    assert seen_share(TEXT[:8].reshape(1, 8), [TEXT.reshape(1, -1)]) == 1
    assert seen_share(TEXT[:64].reshape(1, 64), [TEXT.reshape(-1, 8)]) == 0
    assert seen_share(TEXT[:0].reshape(0, 8), [TEXT.reshape(1, -1)]) == 0
