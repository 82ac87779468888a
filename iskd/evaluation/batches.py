"""Texts to be scored as padded batches, in which a beginning that several texts have is read once.

Two things are shared: an input that begins another one is no row of its own, as in a causal model the longer input
gives all that its beginnings give; and choices that go on from one context (a stem) go on from its KV cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SHORTEST_STEM = 8
"""Tokens below which a stem has no pass of its own: it would be a small one for little. Not measured."""


@dataclass(frozen=True)
class Text:
    """Input ids of one pair, the ids that its last positions predict, and the number of its context.

    Texts of one context are those that may share a stem.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    context: int = 0

    @property
    def silent(self) -> int:
        """How many tokens come before the first that predicts a target."""
        return len(self.ids) - len(self.targets)


@dataclass(frozen=True)
class Batch:
    """Padded rows [B, T] behind their stems, and the M positions in them that predict continuations, pair by pair.

    Attributes:
        ids: what of the texts is not in their stems [B, T].
        stem_B: the stem that each row goes on from.
        row_M, at_M: place of the predicting positions in `ids`.
        targets_M: what they predict.
        pairs: numbers of the texts.
        lengths: of their targets, in the same order.
    """

    ids: Tensor
    stem_B: Tensor
    row_M: Tensor
    at_M: Tensor
    targets_M: Tensor
    pairs: list[int]
    lengths: list[int]


@dataclass(frozen=True)
class Stems:
    """G beginnings of S tokens each [G, S], and the batches that go on from them; S = 0: they begin with themselves."""

    ids: Tensor
    batches: list[Batch]


Row = list[int]  # texts, of which each begins the one before


def stems(texts: Sequence[Text], batch_tokens: int, *, share: bool) -> Iterator[Stems]:
    """All texts, those that share no stem first and the longest of each first.

    Args:
        texts: what is scored.
        batch_tokens: most tokens in a batch, those of its stems and padding included, but for a single longer text.
        share: whether contexts are read once for all their continuations.
    """
    rows = _rows(texts)
    families: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        families[texts[row[0]].context].append(row)
    lengths = {key: _shared(texts, family) if share else 0 for key, family in families.items()}
    alone = [row for key, family in families.items() if not lengths[key] for row in family]
    for batch in _batches(texts, [(row, 0) for row in alone], 0, batch_tokens):
        yield Stems(torch.empty(0, 0, dtype=torch.int64), [batch])
    keys = sorted((key for key in families if lengths[key]), key=lambda key: -lengths[key])
    while keys:
        longest = lengths[keys[0]]
        # all stems of a batch are cut to the shortest, and what is cut off is read once for every continuation
        near = next((i for i, key in enumerate(keys) if 4 * lengths[key] < 3 * longest), len(keys))
        taken = keys[: min(near, max(1, batch_tokens // longest))]
        keys = keys[len(taken) :]
        length = lengths[taken[-1]]
        ids = torch.tensor([texts[families[key][0][0]].ids[:length] for key in taken])
        each = [(row, stem) for stem, key in enumerate(taken) for row in families[key]]
        yield Stems(ids, list(_batches(texts, each, length, batch_tokens)))


def _rows(texts: Sequence[Text]) -> list[Row]:
    """Indices of texts by the row that scores them: in a causal model an input gives all that its beginnings give."""
    rows: list[Row] = []
    # in order, an input is followed by one that it begins, if there is any
    for i in sorted(range(len(texts)), key=lambda i: texts[i].ids, reverse=True):
        ids = texts[i].ids
        # choices of one token share their input: one row of the model answers them all
        if rows and texts[rows[-1][0]].ids[: len(ids)] == ids:
            rows[-1].append(i)
        else:
            rows.append([i])
    return rows


def _shared(texts: Sequence[Text], family: Sequence[Row]) -> int:
    """Tokens that all rows begin with and that predict no target; 0 where it is not worth a pass."""
    if len(family) < 2:
        return 0
    inputs = [texts[row[0]].ids for row in family]
    # rows are in order: what the first and the last have in common, all have
    first, last = inputs[0], inputs[-1]
    alike = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(last))
    length = min(alike, *(texts[i].silent for row in family for i in row))
    return length if length >= SHORTEST_STEM else 0


def _batches(texts: Sequence[Text], rows: list[tuple[Row, int]], cut: int, batch_tokens: int) -> Iterator[Batch]:
    """Rows and their stems of `cut` tokens, the longest first; at most a quarter of a batch is padding."""
    rows = sorted(rows, key=lambda row: -len(texts[row[0][0]].ids))  # a batch that does not fit fails at once
    lengths = [len(texts[row[0]].ids) for row, _ in rows]
    start = 0
    while start < len(rows):
        longest = lengths[start]
        # a batch ends when it is full, or at the first row that would be more than a quarter padding
        full = start + max(1, batch_tokens // longest)
        end = next((i for i in range(start, len(rows)) if 4 * (lengths[i] - cut) < 3 * (longest - cut)), len(rows))
        yield _batch(texts, rows[start : min(full, end)], cut)
        start = min(full, end)


def _batch(texts: Sequence[Text], rows: Sequence[tuple[Row, int]], cut: int) -> Batch:
    placed = [(number, texts[i]) for number, (row, _) in enumerate(rows) for i in row]
    # the last input predicts the last target, so M of the B * T states are read, pair by pair
    at = [range(text.silent - cut, len(text.ids) - cut) for _, text in placed]
    return Batch(
        # no position sees a later one, so any token can pad; with their own, hosts would warn that no mask came along
        pad_sequence([torch.tensor(texts[row[0]].ids[cut:]) for row, _ in rows], True, float(placed[0][1].ids[-1])),
        torch.tensor([stem for _, stem in rows]),
        torch.tensor([number for number, text in placed for _ in text.targets]),
        torch.tensor(list(chain.from_iterable(at))),
        torch.tensor(list(chain.from_iterable(text.targets for _, text in placed))),
        [i for row, _ in rows for i in row],
        [len(text.targets) for _, text in placed],
    )
