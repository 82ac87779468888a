"""Scores along a run: validation inside stages, tasks after every stage, students of stages that are kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from iskd.evaluation import EvalSpec, quantize
from iskd.evaluation.results import evaluation_of
from iskd.export import load
from iskd.models import Stack
from iskd.plan import Record
from iskd.plan.run_files import EVALUATION_FILE, PLAN_FILE
from iskd.report import write_report, write_runs_report
from iskd.report.figures.score_curves import score_curve
from iskd.schedules.align import Align
from iskd.schedules.edits import ConvertTo, RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.system import read_json
from iskd.training import Parts, run, stages
from iskd.training.state import students
from tests.runs import MIXER, TOKENS, At, Crash, crash, make_parts, metric_rows, same, weights, write_text

EVERY = EvalSpec(every=3 * TOKENS)
COPY = EvalSpec(["copy"], 6, resamples=20, every="stage")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    folder = tmp_path_factory.mktemp("along")
    text = write_text(folder)
    return lambda run_dir, **keys: make_parts(run_dir, text, folder / "cache", **{"schedule": removing(), **keys})


def removing() -> Iterative:
    """Two stages of eight steps."""
    return Iterative(RemoveLayers(), layers=[2, 1], tokens=16 * TOKENS, lr=1e-3)


def told(stages: Any) -> list[dict[str, Any]]:
    rows = [stage.to_json() for stage in stages]
    return [{key: value for key, value in row.items() if "second" not in key and "per_s" not in key} for row in rows]


@pytest.fixture(scope="module")
def plain(make: Callable[..., Parts], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(make(tmp_path_factory.mktemp("plain") / "run"))


@pytest.fixture(scope="module")
def validated(make: Callable[..., Parts], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(make(tmp_path_factory.mktemp("validated") / "run", evaluation=EVERY))


def test_a_student_is_validated_inside_a_stage_and_trained_as_without(plain: Any, validated: Any) -> None:
    inside = [[each["tokens"] for each in stage.inside] for stage in validated.stages]
    assert inside == [[], [3 * TOKENS, 6 * TOKENS], [9 * TOKENS, 12 * TOKENS, 15 * TOKENS]]
    assert same(weights(plain), weights(validated))
    for mine, other in zip(validated.stages, plain.stages, strict=True):
        assert replace(mine, inside=[]).to_json()["kl"] == other.to_json()["kl"]
    rows = [row for row in metric_rows(validated.run_dir) if "val/inside" in row]
    assert [float(row["tokens"]) for row in rows] == [tokens for stage in inside for tokens in stage]
    assert all({"val/kl", "val/ppl"} <= row.keys() for row in rows)


@pytest.mark.parametrize("batch", [14, 25])
def test_a_resumed_run_has_the_same_measurements(
    batch: int, make: Callable[..., Parts], validated: Any, tmp_path: Path
) -> None:
    """Broken off right after a measurement, and between two."""
    parts = partial(make, tmp_path / "run", evaluation=EVERY, options={"checkpoint_every": 3})
    with pytest.raises(Crash):
        run(parts(callbacks=[At(batch, crash)]))
    again = run(parts(resume=True))
    assert told(again.stages) == told(validated.stages)
    assert metric_rows(again.run_dir) == metric_rows(validated.run_dir)
    assert same(weights(again), weights(validated))


def test_a_layout_that_changes_leaves_a_run_as_long_as_it_is(make: Callable[..., Parts], tmp_path: Path) -> None:
    """Steps of half the size are twice as many for what is left, and what was trained stays."""
    every = EvalSpec(every=9 * TOKENS)  # of 16 steps, and of 8 smaller ones too many
    parts = partial(make, tmp_path / "run", evaluation=every)
    with pytest.raises(Crash):
        run(parts(callbacks=[At(18, crash)]))  # in the second stage
    again = run(parts(resume=True, batch_size=1))
    assert again.stages[-1].tokens == 16 * TOKENS
    assert [len(stage.inside) for stage in again.stages] == [0, 0, 1]


def test_tasks_are_asked_at_the_start_and_after_every_stage(
    make: Callable[..., Parts], plain: Any, tmp_path: Path
) -> None:
    result = run(make(tmp_path / "run", evaluation=COPY, options={"keep_students": 1}))
    assert same(weights(plain), weights(result))
    asked = [stage.evaluation for stage in result.stages]
    assert all(found and [task["task"] for task in found["tasks"]] == ["copy"] for found in asked)
    assert asked[0] is not None
    assert (asked[0]["tasks"][0]["difference"]["low"], asked[0]["tasks"][0]["difference"]["high"]) == (0.0, 0.0)
    at_the_end = json.loads((result.run_dir / EVALUATION_FILE).read_text())
    assert {key: at_the_end[key] for key in asked[-1] or ()} == asked[-1]
    assert {task["items"] for found in asked if found for task in found["tasks"]} == {6}
    assert any("task/copy" in row for row in metric_rows(result.run_dir))
    points = score_curve("run", result.stages, 4).points
    assert [(point.edited, point.layers) for point in points] == [(0, 4), (1, 3), (2, 2)]
    page = write_report(result.run_dir).read_text()
    for figure in ("task-scores", "scores"):
        assert f'id="{figure}-' in page
    assert 'id="scores-' in write_runs_report([result.run_dir], tmp_path / "runs.html").read_text()
    assert [folder.name for folder in sorted((result.run_dir / "students").iterdir())] == ["002"]
    kept = load(result.run_dir / "students" / "002")
    assert same(weights(result), {name: p for name, p in kept.state_dict().items() if name in weights(result)})


@pytest.mark.parametrize("every", [None, "stage"])
def test_the_last_student_alone_is_measured_in_fewer_bits(
    every: Any, make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a run, whether it is asked along the run or not; the plan counts it there."""
    packed: list[int] = []

    def as_it_is(_kind: str, model: Any) -> Any:
        packed.append(len(Stack(model).layers))
        return copy.deepcopy(model)

    monkeypatch.setattr(quantize, "packed_as", as_it_is)
    monkeypatch.setattr(quantize, "find_spec", lambda name: name)
    text = tmp_path / "asked.txt"
    text.write_text("Sentence number 500 says that 500 plus 3 is 503. " * 8)
    spec = EvalSpec(text=str(text), tokens=96, window=32, resamples=5, quantize=["int8"], every=every)
    schedule = Iterative(RemoveLayers(), layers=[2], tokens=2 * TOKENS, lr=1e-3)
    monkeypatch.setattr(stages, "quantizing_seconds", lambda kinds, tokens, *_: 1e6 * kinds + tokens)
    result = run(make(tmp_path / "run", schedule=schedule, evaluation=spec))
    assert 1e6 + 96 <= read_json(result.run_dir / PLAN_FILE)[-1]["end_seconds"] < 1.1e6
    assert packed == [3], "one kind of one student"
    found = evaluation_of(read_json(result.run_dir / EVALUATION_FILE))
    assert [row.kind for row in found.quantized] == ["float32", "int8"]
    assert found.quantized[1].perplexity == pytest.approx(found.quantized[0].perplexity)
    assert found.text is not None
    assert found.quantized[0].perplexity == pytest.approx(found.text.perplexity)
    assert [stage.evaluation is not None for stage in result.stages] == [every is not None] * 2


def test_layers_are_followed_while_they_are_aligned(make: Callable[..., Parts], tmp_path: Path) -> None:
    schedule = Align(ConvertTo(MIXER), tokens=20 * TOKENS, mixers_share=0.3, hidden_share=0.3)
    parts = make(tmp_path / "run", schedule=schedule, options={"keep_students": True})
    result = run(parts)
    rows = [row for row in metric_rows(result.run_dir) if "align/0" in row]
    assert len(rows) == 12
    assert all(f"align/{layer}" in row for row in rows for layer in range(4))
    assert 'id="dynamics-' in write_report(result.run_dir).read_text()
    assert len(list((result.run_dir / "students").iterdir())) == 3
    torch.manual_seed(0)
    assert len(Stack(load(result.run_dir / "students" / "001")).layers) == 4


def test_what_has_no_room_in_a_run_is_refused(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the teacher was measured")

    monkeypatch.setattr(stages, "measure_quality", measured)
    with pytest.raises(ValueError, match=r"eval.every=99999: the run trains on 2,048 tokens"):
        run(make(tmp_path / "long", evaluation=EvalSpec(every=99_999)))
    usage = students.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(students.shutil, "disk_usage", lambda _path: type(usage)(usage.total, usage.used, 100))
    for plan_only in (False, True):
        with pytest.raises(ValueError, match=r"run.keep_students: 2 students take about .* has room for .*keep fewer"):
            run(make(tmp_path / "full", options={"keep_students": True, "plan_only": plan_only}))


@pytest.mark.parametrize("keys", [{"every": "epoch"}, {"every": 0}, {"every": True}, {"every": 1.5}])
def test_other_values_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"eval.every=.*: choose stage, a number of training tokens, or null"):
        EvalSpec(**keys)


def test_the_record_of_a_run_without_edits_has_no_curve() -> None:
    assert score_curve("none", [], Record(4).num_layers).points == []
