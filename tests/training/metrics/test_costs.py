"""What a plan promises: every part of a run's time once, by what the run is going to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from iskd.evaluation import EvalSpec
from iskd.importance.block_influence import BlockInfluence
from iskd.importance.racing import Racing
from iskd.plan import Record, Remove, Replace, Stage
from iskd.refits.output import Output
from iskd.schedules import History, Schedule, forecast
from iskd.schedules.edits import RemoveLayers, ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.schedules.mixed import Mixed, Step
from iskd.schedules.oneshot import Oneshot
from iskd.system import Busy, read_json
from iskd.training import Parts, run, stages
from iskd.training.deciding import scoring_ahead
from iskd.training.metrics.along import AlongTheRun
from iskd.training.metrics.costs import Costs, a_few, quantizing_seconds, trials_ahead
from iskd.training.plan_table import plan_rows, seconds_of
from tests.factories import tiny
from tests.runs import SLIM, TOKENS, At, Crash, crash, make_parts, write_text

EDITED = Stage("replace 2", (Replace(2, SLIM, seed=3),), tokens=800, lr=1e-3, fit=True)
ROW = {"tokens": 800, "steps": 8, "params": 1_000_000, "trained": 500_000}
COSTS = Costs(token=0.01, refit_tokens=lambda _: 300.0, fit_tokens=lambda _: 200.0, validation=5.0)


def parts_of(costs: Costs, stage: Stage = EDITED, before: int = 0, number: int = 0) -> dict[str, Any]:
    return {name: value for name, value in costs.of(number, stage, ROW, before).items() if value}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"before": False}, {"measure_seconds": 5.0}),
        ({"asking": 7.0}, {"measure_seconds": 17.0}),
        ({"every": 300}, {"measure_seconds": 20.0}),
        ({"every": 50}, {"measure_seconds": 45.0}),  # once after each step but the last
        ({"every": 800}, {}),  # the end of a stage is measured as such
        ({"scoring": [3.0]}, {"score_seconds": 3.0}),
        ({"scoring": [None], "score_tokens": 600}, {"score_seconds": 2.0}),
        # fits and refits are made for each of three candidates, and both models are asked on other text
        ({"trials": [(3, 100)]}, {"trial_seconds": 3 * (1.0 + 3.0 + 2.0 + 10.0)}),
        ({"keeping": 1e-6}, {"keep_seconds": 4.0}),
        ({"saving": 1e-6, "checkpoint_every": 4}, {"save_seconds": 24.0}),
        ({"saving": 1e-6, "checkpoint_every": 50}, {"save_seconds": 8.0}),
    ],
)
def test_every_part_of_a_stage_is_promised_once(changes: dict[str, Any], expected: dict[str, float]) -> None:
    usual = {"train_seconds": 8.0, "refit_seconds": 3.0, "fit_seconds": 2.0, "measure_seconds": 10.0}
    assert parts_of(replace(COSTS, **changes)) == usual | expected


def test_measurements_inside_go_by_the_tokens_of_the_run() -> None:
    costs = Costs(validation=1.0, every=300, before=False)
    assert [parts_of(costs, before=before)["measure_seconds"] for before in (0, 800)] == [3.0, 4.0]
    assert parts_of(costs, Stage("remove 1", (Remove(1),)))["measure_seconds"] == 3.0


def test_the_rows_of_a_plan_add_up() -> None:
    costs = replace(COSTS, begun=11.0, ends=40.0, scoring=[3.0, 0.0], before=False)
    stages = [EDITED, replace(EDITED, name="replace 1", edits=(Replace(1, SLIM, seed=3),))]
    rows = plan_rows(tiny("llama"), stages, [8, 8], 100, costs)
    assert [seconds_of(row) for row in rows] == [11.0, 8 + 3 + 2 + 5 + 3, 8 + 3 + 2 + 5 + 40]
    assert rows[-1]["end_seconds"] == 40.0


def history(schedule: Schedule) -> History:
    return History(Record(6), (), dict.fromkeys(range(6), 0.0), dict.fromkeys(range(6), 10), 5)


def schedules() -> dict[str, tuple[Schedule, list[bool], list[tuple[int, int]]]]:
    keys: dict[str, Any] = {"count": 2, "tokens": 400}
    once = Iterative(ReplaceWith(SLIM), rescore=False, **keys)
    each = Iterative(RemoveLayers(), rescore=True, **keys)
    listed = Iterative(RemoveLayers(), layers=[2, 1], tokens=400)
    tried = Iterative(ReplaceWith(SLIM), candidates=3, trial_tokens=50, **keys)
    mixed = Mixed([Step(listed), Step(once), Step(Oneshot(RemoveLayers(), count=1, tokens=100))])
    none = (0, 0)
    return {
        "once": (once, [True, False], [none] * 2),
        "each": (each, [True, True], [none] * 2),
        "never": (listed, [False, False], [none] * 2),
        "trials": (tried, [True, tried.scoring == "each"], [(3, 50)] * 2),
        "mixed": (mixed, [False, False, True, False, True], [none] * 5),
    }


@pytest.mark.parametrize("name", ["once", "each", "never", "trials", "mixed"])
def test_scores_and_trials_are_promised_to_the_stages_that_have_them(name: str) -> None:
    schedule, expected, trials = schedules()[name]
    stages = forecast(schedule, history(schedule))
    asked = scoring_ahead(schedule, None, history(schedule), stages, 6.0)
    assert [each != 0 for each in asked] == expected
    assert trials_ahead(schedule, history(schedule)) == trials


def test_later_scores_are_promised_by_the_layers_they_are_of() -> None:
    """A race among the two beside the gap is not one among all; nobody knows what another importance takes."""
    gap = Iterative(RemoveLayers(), count=4, tokens=400, rescore=True, contiguous=True)
    before = replace(history(gap), record=Record(8), params=dict.fromkeys(range(8), 10))
    asked = scoring_ahead(gap, Racing(), before, forecast(gap, before), 64.0)
    # the lowest goes first where all are alike, and has one neighbour: one of 7, 6, 5
    assert asked == [64.0, 7.0, 6.0, 5.0]
    assert scoring_ahead(gap, BlockInfluence(), before, forecast(gap, before), 64.0) == [64.0, 49.0, 36.0, 25.0]
    each = Iterative(ReplaceWith(SLIM), count=2, tokens=400, rescore=True)
    mixed = Mixed([Step(gap, BlockInfluence()), Step(each, Racing())])
    assert scoring_ahead(mixed, None, before, forecast(mixed, before), 64.0)[4:] == [None, None]


@pytest.mark.parametrize(("limit", "few", "times"), [(100, 2, 50.0), (1, 1, 1.0), (3, 2, 1.5), (None, 2, 500.0)])
def test_a_few_items_stand_for_all(limit: int | None, few: int, times: float) -> None:
    """And a window for all of the text, however many items there are."""
    kinds: dict[str, Any] = {"every": "stage", "quantize": ["int8"]}
    spec = EvalSpec(["copy"], limit, text="file", tokens=65_536, window=8192, metrics={"copy": "led"}, **kinds)
    (tasks, whole), (text, windows) = a_few(spec)
    assert (tasks.limit, whole, tasks.every, tasks.quantize, tasks.text) == (few, times, None, (), None)
    assert (text.tasks, text.tokens, windows, text.every) == ((), 8192, 8.0, None)
    assert [(each.text, times) for each, times in a_few(EvalSpec((), limit, text="file", tokens=100))] == [
        ("file", 1.0)
    ]
    assert [each.tasks for each, _ in a_few(EvalSpec(["copy"]))] == [("copy",)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Parts]:
    schedule = Iterative(RemoveLayers(), layers=[2, 1], tokens=4 * TOKENS, lr=1e-3)
    text = write_text(tmp_path)
    return lambda **keys: make_parts(tmp_path / "run", text, tmp_path / "cache", **{"schedule": schedule, **keys})


def test_what_is_promised_is_what_is_measured(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of 100 s, by a clock of their own, are promised at the start and after each stage, and counted there."""
    passed, real = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + passed[0])
    slow_tasks(monkeypatch, passed)
    result = run(make(evaluation=EvalSpec(["copy"], 4, resamples=20, every="stage"), options={"keep_students": 1}))
    plan = read_json(tmp_path / "run" / "plan.json")
    assert [100 <= row["measure_seconds"] < 150 for row in plan[1:]] == [True, True]
    assert [100 <= stage.seconds < 150 for stage in result.stages[1:]] == [True, True]
    assert abs(plan[0]["measure_seconds"] - result.stages[0].seconds) < 1
    assert 100 <= plan[-1]["end_seconds"] < 150
    assert 100 <= plan[-1]["ended_after"] < 150


def slow_tasks(monkeypatch: pytest.MonkeyPatch, passed: list[float]) -> None:
    """Tasks of 100 s a model, by the clock of who asks, added to what `passed`."""
    ask = AlongTheRun.ask

    def slow(self: AlongTheRun, *args: Any, **ways: Any) -> Any:
        took = 100.0 if self.seconds else 200.0  # the first time the teacher is asked too
        found = ask(self, *args, **ways)
        passed[0] += took
        self.seconds[-1] += took
        return found

    monkeypatch.setattr(AlongTheRun, "ask", slow)


def test_a_plan_alone_tells_what_its_run_asks_along(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two of four items: 200 s for the teacher as student and as teacher, each student, and the last one again."""
    slow_tasks(monkeypatch, [0.0])
    run(make(evaluation=EvalSpec(["copy"], 4, resamples=20, every="stage"), options={"plan_only": True}))
    plan = read_json(tmp_path / "run" / "plan.json")
    assert 400 <= plan[0]["measure_seconds"] < 450
    assert [200 <= row["measure_seconds"] < 250 for row in plan[1:]] == [True, True]
    assert 200 <= plan[-1]["end_seconds"] < 250


def test_weights_in_fewer_bits_are_in_the_plan() -> None:
    """A text of 600 tokens, read as it is and in each kind, and some turns of writing."""
    cpu = torch.device("cpu")
    told = [quantizing_seconds(kinds, 600, 0.01, cpu) for kinds in range(3)]
    assert told[0] == 0
    assert told[2] - told[1] == pytest.approx(told[1] - 2.0)  # one reading and the turns for each
    assert told[1] > 4.0


def test_tasks_at_the_end_alone_are_in_the_plan(make: Callable[..., Parts], tmp_path: Path) -> None:
    seconds = {}
    for limit in (None, 4, 400):
        spec = None if limit is None else EvalSpec(["copy"], limit, resamples=20)
        run(make(evaluation=spec, options={"plan_only": True}))
        seconds[limit] = read_json(tmp_path / "run" / "plan.json")[-1]["end_seconds"]
    assert seconds[None] == 0.0
    assert seconds[400] > max(0.0, 10 * seconds[4])  # told to a tenth of a second, which four items may not take


def test_long_work_says_how_long_it_may_take_by_the_plan(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first edits by what the plan has for their fits and refits, later measurements by the one before."""
    told: dict[str, list[float | None]] = {}

    class Quiet(Busy):
        def __init__(self, what: str, *, expected: float | None = None) -> None:
            super().__init__(what)
            told.setdefault(what, []).append(expected)

    monkeypatch.setattr(stages, "Busy", Quiet)
    monkeypatch.setattr(stages, "read_json", lambda _file: [{}, {"fit_seconds": 3.0, "refit_seconds": 4}])
    schedule = Iterative(ReplaceWith(SLIM), layers=[2, 1], tokens=8 * TOKENS, lr=1e-3)
    refits = (Output(tokens=256, held_tokens=64),)
    with pytest.raises(Crash):
        run(make(schedule=schedule, refits=refits, callbacks=[At(2, crash)]))
    [(what, [expected])] = [each for each in told.items() if "edits" in each[0]]
    assert what.startswith("replace 2")
    assert expected == 7.0
    told.clear()
    run(make(schedule=schedule, refits=refits, resume=True))
    assert [each is not None for each in told["measuring the student"]] == [False, True, True, True]
