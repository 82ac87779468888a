"""Which windows of a split there are, which of them hold something to learn, and which are taken of many."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from iskd.data.loader import to_tensor
from iskd.data.shards import Shards, Tokens

_log = logging.getLogger(__name__)


class SplitWindows:
    """The windows of open shards.

    Args:
        shards: on disk.
        seq_len: tokens per window.
        max_train_tokens: use only the first so many tokens of the training split.
    """

    def __init__(self, shards: Shards, seq_len: int, max_train_tokens: int | None) -> None:
        self._shards, self._seq_len, self._most = shards, seq_len, max_train_tokens
        self._numbers: dict[str, NDArray[np.int64]] = {}
        self._short: set[str] = set()

    def windows(self, split: str) -> Tokens:
        """Return all windows of a split, memory-mapped, [windows, seq_len]."""
        windows = self._shards.windows(split, self._seq_len)
        if split == "train" and self._most is not None:
            windows = windows[: self._most // self._seq_len]
        return windows

    def targets(self, split: str) -> Tokens | None:
        """Return which tokens of `windows` are to be learned, 0 or 1, [windows, seq_len]; None = all."""
        return self._shards.targets(split, self._seq_len)

    def numbers(self, split: str) -> NDArray[np.int64]:
        """Return the numbers of the windows of a split that hold something to learn: all, but in chats.

        Raises:
            ValueError: there is none.
        """
        if split not in self._numbers:
            windows, targets = self.windows(split), self.targets(split)
            some = np.ones(len(windows), bool)
            if targets is not None:  # the first token of a window is nobody's label
                some = np.asarray(targets[: len(windows), 1:].any(axis=1))
            if not some.any():
                raise ValueError(
                    f"no window of split {split!r} holds an answer of the assistant (data.chat.loss=assistant); use "
                    "rows that end with one, more text, or data.chat.loss=all"
                )
            if not some.all():
                what = "%s: %d of %d windows hold no answer and are left out"
                _log.info(what, split, len(some) - some.sum(), len(some))
            self._numbers[split] = np.flatnonzero(some)
        return self._numbers[split]

    def spread(self, split: str, tokens: int) -> Tokens:
        """Return windows of so many tokens, evenly spaced over the split, at least one, [windows, seq_len]."""
        return self.windows(split)[self._chosen(split, tokens)]

    def spread_targets(self, split: str, tokens: int) -> torch.Tensor | None:
        """Return which tokens of the windows of `spread` are to be learned, [windows, seq_len] bool; None = all."""
        targets = self.targets(split)
        return None if targets is None else to_tensor(targets[self._chosen(split, tokens)]).bool()

    def _chosen(self, split: str, tokens: int) -> NDArray[np.int64]:
        numbers = self.numbers(split)
        wanted = max(1, tokens // self._seq_len)
        if wanted > len(numbers) and split not in self._short:
            self._short.add(split)
            _log.info("%s: %d windows wanted, the split has %d", split, wanted, len(numbers))
        count = min(wanted, len(numbers))
        return numbers[np.arange(count) * len(numbers) // count]
