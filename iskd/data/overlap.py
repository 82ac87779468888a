"""How much of a text is in another one: passages of 13 tokens, as contamination of benchmarks is counted.

Source: GPT-3 (arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iskd.data.shards import kept_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASSAGE = 13  # tokens
MOST = 1 << 25  # tokens that are searched in each text
_NOTICED = 0.1  # of the passages, as boilerplate is in every corpus
_PIECE = 1 << 20  # tokens at a time
_ROW = 1 << 12  # tokens of the windows that shards of earlier runs are cut into
_BASE = np.uint64(0x9E3779B97F4A7C15)

_log = logging.getLogger(__name__)
Windows = NDArray[np.integer[Any]]


def seen_share(windows: Windows, others: Iterable[Windows]) -> float:
    """Share of the passages inside `windows` [W, T] that are inside some window of `others` too, each [W', T'].

    A passage is `PASSAGE` tokens, or a whole window where that is shorter. Of each of `others`, the first `MOST` tokens
    are searched.
    """
    length = min(PASSAGE, windows.shape[1])
    wanted = _hashes(windows, length)
    if not len(wanted):
        return 0.0
    values = np.unique(wanted)
    seen = np.zeros(len(values), bool)
    for other in others:
        for piece in _pieces(other):
            if piece.shape[1] >= length:
                found = _hashes(piece, length)
                at = np.searchsorted(values, found).clip(max=len(values) - 1)
                seen[at[values[at] == found]] = True
    return float(seen[np.searchsorted(values, wanted)].mean())


def seen_before(windows: Windows, cache_dir: Path, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of the passages inside `windows` [W, T] that a student learned from in earlier runs; see `learned`."""
    return seen_share(windows, learned(cache_dir, names, tokenizer))


def learned(cache_dir: Path, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Windows]:
    """What a student has learned from in earlier runs: training and calibration text in windows [W, T].

    Args:
        cache_dir: the folder of token shards.
        names: of the shards there; those that are not at hand are told and left out.
        tokenizer: of the student.
    """
    for name in dict.fromkeys(names):
        shards = kept_shards(cache_dir, name, tokenizer)
        if shards is None:
            _log.warning(
                "what the student learned from in an earlier run is not at hand (%s in %s): no text is held against it",
                *(name or "unnamed", cache_dir),
            )
            continue
        for split in ("train", "calibration"):
            yield shards.windows(split, min(_ROW, shards.tokens(split)))


def tell_seen(share: float) -> None:
    """Warn where much of the validation text is what the student trains or calibrates on."""
    if share >= _NOTICED:
        told = "%.0f %% of the passages of the validation text are in what the student trains or calibrates on: %s"
        advice = "scores on it flatter the student; take such documents out, or set data.val_path"
        _log.warning(told, 100 * share, advice)


def _pieces(windows: Windows) -> Iterator[Windows]:
    rows = max(1, _PIECE // windows.shape[1])
    for first in range(0, min(len(windows), MOST // windows.shape[1] + 1), rows):
        yield windows[first : first + rows]


def _hashes(windows: Windows, length: int) -> NDArray[np.uint64]:
    """One number for each passage that lies inside one window, flat."""
    ids = np.asarray(windows).astype(np.uint64) + np.uint64(1)
    count = ids.shape[1] - length + 1
    found = np.zeros((len(ids), count), np.uint64)
    for offset in range(length):
        found = found * _BASE + ids[:, offset : offset + count]
        found ^= found >> np.uint64(29)
    return found.ravel()
