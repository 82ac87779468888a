"""What added scores promise, made to agree with what plans were measured to lose.

Single scores add up to less than the KL of a student in which many layers are exchanged, the more so the more there
are. So the plans that a search has built tell how far promises fall short: with s the KL by added scores and n the
number of scores in the sum, KL = s (1 + n)^(a + b log s). A sum of nothing is what was measured already and stays as it
is, and of two sums of as many scores the larger one never promises less. Few plans say little: a and b are drawn to 0.

Source: ours; a least-squares fit of two numbers in log KL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

_LEAST = 1e-4  # nats: below it nothing is told apart
_NOISE = 0.1  # of log KL, that no curve explains
_USUAL = (0.2, 0.1)  # how large a and b may well be
_SLOPE = 0.1  # of log KL in log s, at least


@dataclass(frozen=True)
class Promise:
    """KL that added scores promise a plan.

    Attributes:
        added: nats; may be below 0 where scores are mostly noise.
        count: scores in the sum, layers that differ from what they were taken around.
    """

    added: float
    count: int


@dataclass(frozen=True)
class Tried:
    """A plan that was built from the library.

    Attributes:
        choice: an option for every layer.
        promise: KL by added scores.
        measured: KL on all windows held out for scores, nats, of blocks as the library has them.
        found: by what.
        refitted: the same after a refit of the whole student; None = it was not refitted.
    """

    choice: tuple[str, ...]
    promise: Promise
    measured: float
    found: str
    refitted: float | None = None

    @property
    def rank(self) -> tuple[bool, float]:
        """Lower is better: what was refitted comes first, as nothing is known of the others."""
        return self.refitted is None, self.measured if self.refitted is None else self.refitted


@dataclass(frozen=True)
class Calibration:
    """From promises to predictions.

    Attributes:
        shift, bend: a and b of this file's formula; 0 and 0 = scores as they add up.
    """

    shift: float = 0.0
    bend: float = 0.0

    @classmethod
    def fit(cls, promises: Sequence[Promise], measured: Sequence[float], depth: int) -> Calibration:
        """The curve through measured plans.

        Args:
            promises: of the plans.
            measured: their KL, nats.
            depth: layers of the teacher, as many scores as a sum may have.
        """
        rows, goals = [], []
        for promise, kl in zip(promises, measured, strict=True):
            far, size = math.log1p(promise.count), math.log(max(promise.added, _LEAST))
            rows.append([far / _NOISE, far * size / _NOISE])
            goals.append((math.log(max(kl, _LEAST)) - size) / _NOISE)
        rows += [[1.0 / _USUAL[0], 0.0], [0.0, 1.0 / _USUAL[1]]]
        goals += [0.0, 0.0]
        least = -(1.0 - _SLOPE) / math.log1p(depth)  # the slope is 1 + b log(1 + n)
        found = lsq_linear(np.asarray(rows), np.asarray(goals), bounds=([-np.inf, least], [np.inf, np.inf])).x
        return cls(float(found[0]), float(found[1]))

    def of(self, promise: Promise) -> float:
        """Predicted KL, nats."""
        if not promise.count:
            return promise.added
        size = math.log(max(promise.added, _LEAST))
        return math.exp(size + math.log1p(promise.count) * (self.shift + self.bend * size))


def left_out(promises: Sequence[Promise], measured: Sequence[float], depth: int) -> list[float]:
    """Predicted KL of every plan by a curve through the others: what it was measured to lose has no part in it."""
    found = []
    for at, promise in enumerate(promises):
        others, kls = [*promises[:at], *promises[at + 1 :]], [*measured[:at], *measured[at + 1 :]]
        found.append(Calibration.fit(others, kls, depth).of(promise))
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal numbers with their mean rank; None for fewer than three, or all equal."""
    a, b = (values - values.mean() for values in (_ranks(first), _ranks(second)))
    size = math.sqrt(float(a @ a) * float(b @ b))
    return None if len(a) < 3 or not size else float(a @ b) / size


def _ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    _, place, count = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    found: np.ndarray[Any, np.dtype[np.float64]] = (last - (count - 1) / 2.0)[place]
    return found
