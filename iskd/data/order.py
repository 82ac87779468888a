"""The order of the training windows of a mix, a pure function of a window's number, as that of one source is.

Sources take turns by a fixed pattern of `CYCLE` windows in which each has its share, evenly spaced; within its own
windows a source goes by permutations of its own. So the k-th window is found without those before it, every beginning
of the order has the right shares, and a position is one integer, whatever the sources' sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from iskd.data.mix import CYCLE


def permutation(seed: Sequence[int], count: int) -> NDArray[np.int64]:
    """A permutation of `count` numbers; the same on every machine."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed])))
    return generator.permutation(count)


def apportioned(shares: Sequence[float] | NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Split `count` into whole numbers by shares that add up to 1, by largest remainders."""
    exact = np.asarray(shares, dtype=np.float64) * count
    whole = np.floor(exact).astype(np.int64)
    left = count - int(whole.sum())
    whole[np.argsort(-(exact - whole), kind="stable")[:left]] += 1
    return whole


class MixOrder:
    """Which window of which source is the k-th of training.

    Args:
        windows: numbers of the windows of each source, by name; none is empty.
        shares: of the windows of training, by name, adding up to 1.
        seed: of the order within each source.
    """

    def __init__(self, windows: Mapping[str, NDArray[np.int64]], shares: Mapping[str, float], seed: int) -> None:
        self.windows, self.seed = dict(windows), seed
        counts = apportioned([shares[name] for name in windows], CYCLE)
        self._counts = counts
        # the j-th of n windows of a source is due at (j + 1/2) / n of the cycle; ties go by the order of the sources
        sources = np.repeat(np.arange(len(counts)), counts)
        nth = np.concatenate([np.arange(count) for count in counts])
        turns = np.argsort((nth + 0.5) / counts[sources], kind="stable")
        self._source, self._nth = sources[turns], nth[turns]
        self._kept: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def __getitem__(self, place: int) -> int:
        """The number of the window at a place of the order, from 0 on."""
        cycle, at = divmod(place, CYCLE)
        source = int(self._source[at])
        numbers = list(self.windows.values())[source]
        epoch, within = divmod(cycle * int(self._counts[source]) + int(self._nth[at]), len(numbers))
        return int(numbers[self._order(source, epoch, len(numbers))[within]])

    def taken(self, places: int) -> dict[str, int]:
        """How many windows of each source are among the first so many."""
        cycles, rest = divmod(places, CYCLE)
        partly = np.bincount(self._source[:rest], minlength=len(self._counts))
        return {name: int(cycles * self._counts[i] + partly[i]) for i, name in enumerate(self.windows)}

    @property
    def first_repeat(self) -> tuple[int, str]:
        """The first place at which a source begins again, and the name of that source."""
        found = []
        for source, (name, numbers) in enumerate(self.windows.items()):
            cycle, rest = divmod(len(numbers), int(self._counts[source]))
            found.append((cycle * CYCLE + int(np.flatnonzero(self._source == source)[rest]), name))
        return min(found)

    def _order(self, source: int, epoch: int, count: int) -> NDArray[np.int64]:
        kept = self._kept.get(source)
        if kept is None or kept[0] != epoch:
            kept = self._kept[source] = (epoch, permutation((self.seed, epoch, source), count))
        return kept[1]
