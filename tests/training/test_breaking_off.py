"""A stop signal in the middle of scores, fits and measurements is obeyed at once, and what was begun is done again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from iskd.evaluation import EvalSpec
from iskd.importance.block_influence import BlockInfluence
from iskd.refits.output import Output
from iskd.schedules.edits import ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.system import Preempted
from iskd.system.stop_signals import EXIT_CODE
from iskd.training import Parts, editing, run
from iskd.training.restart import StartAgain
from tests.runs import BOTTLENECK, TOKENS, interrupt, make_parts, metric_rows, same, weights, write_text


def stopped() -> None:
    """A signal, and then work that takes its time."""
    os.kill(os.getpid(), signal.SIGTERM)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.01)
    raise AssertionError("the signal was not obeyed")


class Slow(BlockInfluence):
    """Asked for the second time, it is stopped in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            stopped()
        return super().rows(student, teacher, batches)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    folder = tmp_path_factory.mktemp("stops")
    text = write_text(folder)
    schedule = Iterative(ReplaceWith(BOTTLENECK), count=2, rescore=True, tokens=4 * TOKENS, lr=1e-3)
    return lambda run_dir, **keys: make_parts(run_dir, text, folder / "cache", schedule=schedule, **keys)


@pytest.fixture(scope="module")
def whole(make: Callable[..., Parts], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(make(tmp_path_factory.mktemp("whole") / "run"))


# calls of `validation`: the teacher, before and after healing of the first stage
@pytest.mark.parametrize(("place", "call"), [("score", 1), ("fit", 0), ("validation", 0), ("validation", 2)])
def test_a_stop_is_obeyed_at_once(
    place: str, call: int, make: Callable[..., Parts], whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"importance": Slow()} if place == "score" else {}
    with monkeypatch.context() as patched:
        if place != "score":
            interrupt(patched.setattr, place, call, stopped)
        began = time.monotonic()
        with pytest.raises(Preempted):
            run(make(tmp_path / "run", **keys))
        assert time.monotonic() - began < 50
    again = run(make(tmp_path / "run", resume=True))
    assert same(weights(again), weights(whole))
    assert [row.kl for row in again.stages] == [row.kl for row in whole.stages]
    assert [row.scores for row in again.stages] == [row.scores for row in whole.stages]
    assert metric_rows(again.run_dir) == metric_rows(whole.run_dir)


def inside(**keys: Any) -> dict[str, Any]:
    """Measured within a stage as well."""
    schedule = Iterative(ReplaceWith(BOTTLENECK), layers=[2], tokens=6 * TOKENS, lr=1e-3)
    return {"schedule": schedule, "evaluation": EvalSpec(every=2 * TOKENS), **keys}


def trials() -> dict[str, Any]:
    """Two candidates are tried."""
    more: dict[str, Any] = {"candidates": 2, "trial_tokens": 2 * TOKENS}
    return {"schedule": Iterative(ReplaceWith(BOTTLENECK), count=1, tokens=4 * TOKENS, lr=1e-3, **more)}


@pytest.mark.parametrize(("keys", "call"), [(inside(), 2), (inside(), 3), (trials(), 2)])
def test_a_stop_inside_a_stage_is_obeyed_and_nothing_is_missed(
    keys: dict[str, Any], call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first measurement inside, the second one, the verdict on a trial."""
    text = write_text(tmp_path)
    whole = run(make_parts(tmp_path / "whole", text, tmp_path / "cache", **keys))
    with monkeypatch.context() as patched:
        interrupt(patched.setattr, "validation", call, stopped)
        with pytest.raises(Preempted):
            run(make_parts(tmp_path / "run", text, tmp_path / "cache", **keys))
    again = run(make_parts(tmp_path / "run", text, tmp_path / "cache", resume=True, **keys))
    assert same(weights(again), weights(whole))
    assert [row.inside for row in again.stages] == [row.inside for row in whole.stages]
    assert [row.events for row in again.stages] == [row.events for row in whole.stages]
    assert metric_rows(again.run_dir) == metric_rows(whole.run_dir)


@pytest.mark.parametrize("place", ["fit", "refit"])
def test_a_stop_is_obeyed_in_an_edit_of_a_fresh_process(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which makes it before anything is wrapped; the next one makes it again."""
    text = write_text(tmp_path)
    schedule = Iterative(ReplaceWith(BOTTLENECK), layers=[2], tokens=4 * TOKENS, lr=1e-3, restart_at_edit=True)
    keys: dict[str, Any] = {"schedule": schedule, "refits": (Output(tokens=256, held_tokens=64),)}

    def parts(name: str, **more: Any) -> Parts:
        return make_parts(tmp_path / name, text, tmp_path / "cache", **keys, **more)

    for name in ("whole", "run"):
        with pytest.raises(StartAgain):
            run(parts(name))
    whole = run(parts("whole", resume=True))
    with monkeypatch.context() as patched:
        if place == "fit":
            interrupt(patched.setattr, "fit", 0, stopped)
        else:
            patched.setattr(editing, "refit_survivors", lambda *_args, **_keys: stopped())
        with pytest.raises(Preempted) as caught:
            run(parts("run", resume=True))
    assert caught.value.code == EXIT_CODE
    again = run(parts("run", resume=True))
    assert same(weights(again), weights(whole))
    assert [row.kl for row in again.stages] == [row.kl for row in whole.stages]
