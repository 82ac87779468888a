"""Metrics that are one number of all items together and no mean over them: MCC, F1, perplexities, BLEU of a corpus."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Aggregate:
    """A metric that lm-evaluation-harness aggregates over items by a function of its own.

    Attributes:
        told: what each item contributes [N]: a number, a pair of label and guess, a reference and a text.
        leaves: the task that each item is of [N]. Each task is aggregated by itself, and the tasks of a group count by
            their items.
        functions: the harness's aggregation, by task.
        unit: what counts as 1; 100 where numbers are per cent.
    """

    told: Sequence[Any]
    leaves: Sequence[str]
    functions: Mapping[str, Callable[[list[Any]], Any]]
    unit: float = 1.0

    def over(self, rows: Sequence[int]) -> float:
        """The metric of these items, which may repeat; nan where they have none, e.g. where a label is missing."""
        try:
            return self._aggregated(rows)
        except (ArithmeticError, ValueError):
            return math.nan

    def check(self) -> None:
        """Raise what the harness's function raises for all items together."""
        self._aggregated(range(len(self.told)))

    def _aggregated(self, rows: Sequence[int]) -> float:
        by_leaf: dict[str, list[Any]] = {}
        for row in rows:
            by_leaf.setdefault(self.leaves[row], []).append(self.told[row])
        total = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for leaf, told in by_leaf.items():
                try:
                    total += len(told) * float(self.functions[leaf](told))
                except OverflowError:  # the perplexity of a broken model
                    return math.inf
        return total / len(rows) / self.unit

    @property
    def reads_texts(self) -> bool:
        """Whether texts are read again for every number, which takes long."""
        return any(isinstance(value, str) for value in _flat(list(self.told[:1])))

    def whole(self) -> float:
        """The metric of all items."""
        return self.over(range(len(self.told)))


def _flat(values: Any) -> list[Any]:
    return [each for value in values for each in _flat(value)] if isinstance(values, list | tuple) else [values]
