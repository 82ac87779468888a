"""The clock of a stage, on a clock of its own: what is counted as waiting, training and neither."""

from __future__ import annotations

from typing import Any, cast

import pytest

from iskd.training.metrics import stage_clock
from iskd.training.metrics.stage_clock import StageClock


class Hands:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Meter:
    def stage(self, module: Any, batch: Any, speed: float) -> dict[str, float]:
        return {"train/mfu": speed * batch["share"]}


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr(stage_clock, "time", hands)
    return hands


def train(clock: StageClock, hands: Hands, *steps: tuple[float, float]) -> None:
    for wait, work in steps:
        hands.now += wait
        clock.batch_starts()
        hands.now += work
        clock.batch_ends({"share": 0.5})


def test_waiting_is_what_lies_between_two_batches(hands: Hands) -> None:
    clock = StageClock()
    hands.now += 100.0  # an edit before the training
    clock.train(tokens=1000)
    train(clock, hands, (1.0, 3.0), (0.0, 4.0))
    hands.now += 50.0  # measuring after it
    assert clock.end(cast(Any, None), tokens=1800) == {"train/data_share": 1 / 8}
    assert clock.speed == 100.0
    assert clock.lap() == 158.0
    assert clock.lap() == 0.0


def test_each_stage_counts_its_own_training(hands: Hands) -> None:
    clock = StageClock()
    clock.meter = cast(Any, Meter())
    clock.train(tokens=0)
    train(clock, hands, (5.0, 5.0))
    clock.end(cast(Any, None), tokens=10)
    clock.train(tokens=10)
    train(clock, hands, (0.0, 2.0))
    assert clock.end(cast(Any, None), tokens=30) == {"train/data_share": 0.0, "train/mfu": 5.0}


def test_a_stage_without_training_has_no_meter_and_no_division_by_zero(hands: Hands) -> None:
    clock = StageClock()
    clock.meter = cast(Any, Meter())
    clock.train(tokens=0)
    assert clock.end(cast(Any, None), tokens=0) == {"train/data_share": 0.0}
