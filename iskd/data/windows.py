"""Which windows of a split there are, which of them hold something to learn, and which are taken of many.

Of a mix every source has windows of its own, of which as many are taken as its share says.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from iskd.data.loader import to_tensor
from iskd.data.mix import Mix
from iskd.data.order import MixOrder, apportioned
from iskd.data.shards import Shards, Tokens
from iskd.system import Json

_log = logging.getLogger(__name__)


class SplitWindows:
    """The windows of open shards.

    Args:
        shards: on disk.
        seq_len: tokens per window.
        max_train_tokens: use only the first so many tokens of the training split, of a mix by its shares.
        mix: the sources and their shares; None = one source.
    """

    def __init__(self, shards: Shards, seq_len: int, max_train_tokens: int | None, mix: Mix | None = None) -> None:
        self._shards, self._seq_len, self._most, self._mix = shards, seq_len, max_train_tokens, mix
        self._found: dict[str, dict[str, NDArray[np.int64]]] = {}
        self._short: set[str] = set()

    def windows(self, split: str) -> Tokens:
        """Return all windows of a split, memory-mapped, [windows, seq_len]."""
        windows = self._shards.windows(split, self._seq_len)
        if split == "train" and self._most is not None and self._mix is None:
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
        return np.concatenate([*self.by_source(split).values()])

    def by_source(self, split: str) -> dict[str, NDArray[np.int64]]:
        """Return `numbers` by the source that they are of, "" = of the only one.

        Raises:
            ValueError: there is none, or a source of a mix has none for training.
        """
        if split not in self._found:
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
            self._found[split] = self._of_sources(split, some)
        return self._found[split]

    def order(self, seed: int) -> MixOrder | None:
        """Return the order of training of a mix; None = one source, in permutations of its windows."""
        return None if self._mix is None else MixOrder(self.by_source("train"), self._mix.shares, seed)

    def spread(self, split: str, tokens: int) -> Tokens:
        """Return windows of so many tokens, evenly spaced over the split, at least one, [windows, seq_len]."""
        return self.windows(split)[self._chosen(split, tokens)]

    def spread_targets(self, split: str, tokens: int) -> torch.Tensor | None:
        """Return which tokens of the windows of `spread` are to be learned, [windows, seq_len] bool; None = all."""
        targets = self.targets(split)
        return None if targets is None else to_tensor(targets[self._chosen(split, tokens)]).bool()

    def _of_sources(self, split: str, some: NDArray[np.bool_]) -> dict[str, NDArray[np.int64]]:
        """The numbers of the windows that are asked for, [windows], by source."""
        if self._mix is None:
            return {"": np.flatnonzero(some)}
        found: dict[str, NDArray[np.int64]] = {}
        sections = self._shards.sections(split, self._seq_len)
        for name in self._mix.sources:
            first, end = sections.get(name, (0, 0))
            own = first + np.flatnonzero(some[first:end])
            if split == "train" and self._most is not None:
                own = own[: max(1, int(self._mix.shares[name] * self._most) // self._seq_len)]
            if len(own):
                found[name] = own
            elif split == "train":
                tokens = (self._shards.meta.splits[split].sections or {}).get(name, 0)
                raise ValueError(
                    f"data.sources.{name} has {tokens:,} tokens to train on, too few for a window of data.seq_len="
                    f"{self._seq_len}; give it more text, lower data.seq_len, or leave the source out"
                )
            else:
                _log.warning("%s: data.sources.%s has no window of it, and the others stand for it", split, name)
        if not found:
            raise ValueError(
                f"no source has a window of data.seq_len={self._seq_len} in split {split!r}; use more text, lower "
                f"data.seq_len, or raise data.{split}_fraction"
            )
        return found

    def _chosen(self, split: str, tokens: int) -> NDArray[np.int64]:
        sources = self.by_source(split)
        wanted = max(1, tokens // self._seq_len)
        shares = [1.0] if self._mix is None else [self._mix.shares[name] for name in sources]
        each = apportioned(np.asarray(shares) / sum(shares), wanted)
        chosen = []
        for (name, numbers), count in zip(sources.items(), each.tolist(), strict=True):
            if count > len(numbers) and f"{split} {name}" not in self._short:
                self._short.add(f"{split} {name}")
                of = f" of data.sources.{name}" if name else ""
                _log.info("%s: %d windows wanted, the split%s has %d", split, count, of, len(numbers))
            count = min(count, len(numbers))
            chosen.append(numbers[np.arange(count) * len(numbers) // max(1, count)])
        return np.concatenate(chosen)


def of_mix(mix: Mix, windows: SplitWindows, shards: Shards) -> Json:
    """What identifies a mix and its sources, as plain JSON values."""
    return {
        "exhausted": mix.exhausted,
        "sources": {
            name: {
                "weight": weight,
                "share": mix.shares[name],
                "tokens": {split: (entry.sections or {}).get(name, 0) for split, entry in shards.meta.splits.items()},
                "train_windows": len(windows.by_source("train")[name]),
            }
            for name, (_, weight) in mix.sources.items()
        },
    }


def plan_mix(mix: Mix, order: MixOrder | None, places: int, seq_len: int) -> list[str]:
    """What a run takes of each source, a line for each.

    Args:
        mix: the sources.
        order: of their windows.
        places: windows of the run.
        seq_len: tokens per window.

    Raises:
        ValueError: a source has less than its share of the run, and `exhausted` is `stop`.
    """
    assert order is not None  # as there is a mix
    end, first = order.first_repeat
    if places > end and mix.exhausted == "stop":
        raise ValueError(
            f"data.sources.{first} is used up after {end * seq_len:,} of the {places * seq_len:,} tokens of the run; "
            f"lower schedule.tokens or data.sources.{first}.weight, give it more text, or set "
            "data.source.exhausted=repeat"
        )
    lines = []
    for name, count in order.taken(places).items():
        has = len(order.windows[name])
        again = f", read {count / has:.1f} times" if count > has else ""
        lines.append(
            f"{name}: {mix.shares[name]:.1%} of training, {count * seq_len:,} of {has * seq_len:,} tokens{again}"
        )
    return lines


def check_sizes(
    sizes: Json, max_train_tokens: int | None, *, boundaries: bool, seed: int, max_context: int | None
) -> None:
    """Raise ValueError where the windows that `data` asks for cannot be.

    Args:
        sizes: `seq_len`, `batch_size`, `val_tokens`.
        max_train_tokens: of the training split; None = all.
        boundaries: documents are apart.
        seed: of the order.
        max_context: longest sequence of the model; None = any.
    """
    for key, value in sizes.items():
        if value < (2 + boundaries if key == "seq_len" else 1):  # apart, a token alone has nothing before it
            least = "seq_len is at least 2, with data.boundaries=true 3, the others at least 1"
            raise ValueError(f"data.{key}={value} is too small; {least}")
    if seed < 0:
        raise ValueError(f"data.seed={seed} is negative; use 0 or more")
    seq_len = sizes["seq_len"]
    if max_context is not None and seq_len > max_context:
        raise ValueError(
            f"data.seq_len={seq_len} is longer than the model's context of {max_context} tokens; "
            f"set data.seq_len to at most {max_context}"
        )
    if max_train_tokens is not None and max_train_tokens < seq_len:
        raise ValueError(
            f"data.max_train_tokens={max_train_tokens} is less than one window of data.seq_len={seq_len}; "
            "raise it, or lower data.seq_len"
        )
