"""The time of a stage: all of it, its training, how long steps wait for data and what share of the peak they use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from iskd.training.step import DistillModule, MfuMeter


class StageClock:
    """Wall time on the host, in seconds; nothing here waits for the device.

    Attributes:
        meter: measures the share of the matrix peak; None = it is not asked for.
        refit: seconds that the refits of the stage's edit took.
        speed: training tokens per second of the latest stage; None before its end, and of one without training.
    """

    def __init__(self) -> None:
        self.meter: MfuMeter | None = None
        self.speed: float | None = None
        self.refit = 0.0
        self._lap = self._ended = time.perf_counter()
        self._trained = self._waited = 0.0
        self._tokens = 0
        self._batch: Mapping[str, Any] | None = None

    def lap(self) -> float:
        """Seconds since the last call, or since the clock was made."""
        last, self._lap = self._lap, time.perf_counter()
        return self._lap - last

    def train(self, tokens: int) -> None:
        """The stage's training begins, with that many tokens behind the run."""
        self._ended, self._tokens = time.perf_counter(), tokens
        self._trained = self._waited = 0.0

    def batch_starts(self) -> None:
        """A batch is there: what has passed since the one before was spent on getting it."""
        self._waited += self._count()

    def batch_ends(self, batch: Mapping[str, Any]) -> None:
        """A batch is done, with all that the callback does after it."""
        self._count()
        self._batch = batch

    def apart(self, seconds: float) -> None:
        """So much of the time since the batch began was no training."""
        self._ended += seconds

    def _count(self) -> float:
        last, self._ended = self._ended, time.perf_counter()
        self._trained += self._ended - last
        return self._ended - last

    def edits(self) -> dict[str, float]:
        """Metrics of a stage's edits: the time of refits, where there were any."""
        return {"train/refit_seconds": self.refit} if self.refit else {}

    def end(self, module: DistillModule, tokens: int) -> dict[str, float]:
        """Metrics of a stage's training, `tokens` now behind the run; before its adapters merge."""
        trained = max(self._trained, 1e-9)
        self.speed = (tokens - self._tokens) / trained
        values = {"train/data_share": self._waited / trained, **self.edits()}
        if self.meter is None or self._batch is None:
            return values
        return {**values, **self.meter.stage(module, self._batch, self.speed)}
