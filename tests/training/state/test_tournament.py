"""The rank-flip guard: trials leave nothing behind, the best one wins, and a killed run goes on inside a trial."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from iskd.plan import Remove, Stage
from iskd.schedules.edits import RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.system.faults import NonFiniteError
from iskd.system.reading import read_as
from iskd.training.parts import Parts, Result
from iskd.training.runner import run
from iskd.training.state.tournament import Tournament
from tests.runs import TOKENS, At, Crash, crash, make_parts, same, weights, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    return partial(make_parts, text=text, cache=tmp_path_factory.getbasetemp() / "cache", dropout=0.0)


def schedule(**changes: object) -> Iterative:
    values = {
        "count": 2,
        "tokens": 8 * TOKENS,
        "lr": 1e-3,
        "rescore": True,
        "candidates": 3,
        "trial_tokens": 2 * TOKENS,
    }
    return Iterative(RemoveLayers(), **{**values, **changes})  # type: ignore[arg-type]


def test_the_winner_is_trained_as_if_there_had_been_no_trials(make: Callable[..., Parts], tmp_path: Path) -> None:
    guarded = run(make(tmp_path / "guarded", schedule=schedule()))
    chosen = [edit.layer for edit in guarded.record.edits]
    plain = run(make(tmp_path / "plain", schedule=Iterative(RemoveLayers(), layers=chosen, tokens=8 * TOKENS, lr=1e-3)))
    assert same(weights(guarded), weights(plain))
    assert [stage.name for stage in guarded.stages] == ["teacher", *(f"remove {layer}" for layer in chosen)]
    assert guarded.final.tokens == plain.final.tokens + 2 * 3 * 2 * TOKENS, "trials are counted"
    for stage in guarded.stages[1:]:
        (verdict,) = [event for event in stage.events if event.startswith("KL after")]
        trials = verdict.partition(": ")[2].partition(";")[0].split(", ")
        kl = {name: float(value) for name, value in (trial.rsplit(" ", 1) for trial in trials)}
        assert len(kl) == 3
        assert kl[stage.name] == min(kl.values())


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """An uninterrupted run of one stage."""
    folder, cache = tmp_path_factory.mktemp("whole"), tmp_path_factory.getbasetemp() / "cache"
    return run(make_parts(folder / "run", text, cache, schedule=schedule(count=1), dropout=0.0))


@pytest.mark.parametrize("batch", [2, 7, 13])
def test_a_run_killed_inside_a_trial_goes_on(
    batch: int, whole: Result, make: Callable[..., Parts], tmp_path: Path
) -> None:
    parts = make(tmp_path / "killed", schedule=schedule(count=1), options={"checkpoint_every": 1})
    parts.callbacks.append(At(batch, crash))
    with pytest.raises(Crash):
        run(parts)
    resumed = run(make(tmp_path / "killed", schedule=schedule(count=1), resume=True))
    assert same(weights(resumed), weights(whole))
    assert [stage.events for stage in resumed.stages] == [stage.events for stage in whole.stages]


def test_values_and_json() -> None:
    stages = tuple(Stage(f"remove {layer}", (Remove(layer),), tokens=1000) for layer in (3, 5))
    trials = Tournament(stages, 100)
    assert (trials.stage.name, trials.stage.tokens, trials.over) == ("trial: remove 3", 100, False)
    trials = trials.judged(0.5)
    assert read_as(Tournament, json.loads(json.dumps(trials.to_json())), "trials") == trials
    trials = trials.judged(0.4)
    assert trials.over
    assert trials.stage == stages[1]
    assert "kept remove 5, instead of remove 3" in trials.verdict()
    for broken in ({}, {**Tournament(stages, 100).to_json(), "tokens": -1}, {"candidates": [], "tokens": 1, "kl": []}):
        with pytest.raises(ValueError, match="trials"):
            read_as(Tournament, broken, "trials")


@pytest.mark.parametrize(("kl", "best"), [((math.nan, 2.0, 1.0), 2), ((math.nan, math.inf), 1), ((math.nan,) * 2, 0)])
def test_a_trial_without_a_number_wins_against_none(kl: tuple[float, ...], best: int) -> None:
    stages = tuple(Stage(f"remove {layer}", (Remove(layer),)) for layer in range(len(kl)))
    assert Tournament(stages, 8, kl).stage == stages[best]
    before = Tournament(stages, 8, kl[:-1])
    if any(map(math.isfinite, kl)):
        assert before.judged(kl[-1]).stage == stages[best]
    else:
        with pytest.raises(NonFiniteError, match="not finite after any of the trials remove 0, remove 1"):
            before.judged(kl[-1])
