"""What a run is made of, where the config leaves it to the run's other values."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from iskd.commands import build
from iskd.commands.build.schedule import schedule_of
from iskd.commands.compose import compose_config
from iskd.commands.line.steps import restarts_at_edit
from iskd.commands.values import as_meant, plain
from iskd.importance.task_accuracy import TaskAccuracy
from iskd.plan import Record
from iskd.plan.run_files import CONFIG_FILE, LOCK_FILE, PLAN_FILE
from iskd.plan.saved_config import read_config
from iskd.schedules import History, forecast
from iskd.system import run_lock
from iskd.system.faults import UnavailableError


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        (["schedule.tokens=4096"], 1),
        (["schedule.tokens=8192"], 2),
        (["schedule.tokens=1e9"], 2),
        (["schedule.tokens=0"], 2),
        (["schedule.tokens=8192", "trainer.accumulate_grad_batches=2"], 1),
        (["schedule.tokens=4096", "data.batch_size=3"], 3),
        (["schedule.tokens=4096", "data=tinystories", "data.path=texts.txt", "data.seq_len=64"], 4),
    ],
)
def test_a_small_budget_takes_small_steps(
    given: list[str], windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 steps at least, with windows of 64 tokens; the number is of the run, so that it resumes with it."""
    monkeypatch.setenv("ISKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("Once upon a time.\n\n" * 2000)
    config, _ = compose_config(["model=tiny", "data=sample", "data.seq_len=64", "trainer=cpu", *given])
    parts = build.parts(config, tmp_path / "run")
    run_lock.release(tmp_path / "run" / LOCK_FILE)
    assert parts.data.batch_size == read_config(tmp_path / "run" / CONFIG_FILE)["data"]["batch_size"] == windows


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{edit: remove, count: 0}", "schedule.count=0: nothing would be edited"),
        ("{edit: remove, count: 2, target_layers: 1}", "schedule.count=2 and schedule.target_layers=1 are two targets"),
        ("{edit: remove, count: 1, importance: task_accuracy}", "importance.data_dir is not set"),
        ("{edit: convert, mixer: gla, attention_share: 2}", "schedule.attention_share=2.0 must be in"),
    ],
)
def test_what_a_step_refuses_is_told_with_the_step(step: str, said: str) -> None:
    words = ["model=tiny", "schedule=mixed", f"schedule.steps=[{{edit: remove, count: 1}}, {step}]"]
    config = as_meant(compose_config([*words, "schedule.tokens=64"])[0])
    with pytest.raises(ValueError, match=re.escape(f"schedule.steps[1]: {said}")):
        schedule_of(config)


@pytest.mark.parametrize(
    ("step", "fresh"),
    [
        ("{edit: remove, count: 1}", False),
        ("{edit: remove, count: 1, restart_at_edit: true}", True),
        ("{edit: remove, count: 1, schedule: {name: oneshot, restart_at_edit: true}}", True),
    ],
)
def test_a_step_that_edits_in_fresh_processes_is_known_as_written_and_in_full(step: str, fresh: bool) -> None:
    """A sweep, whose jobs share a process, asks before anything is composed further."""
    words = ["model=tiny", "schedule=mixed", f"schedule.steps=[{{edit: remove, count: 1}}, {step}]"]
    config = compose_config([*words, "schedule.tokens=64"])[0]
    assert restarts_at_edit(plain(config.schedule)) is fresh
    assert restarts_at_edit(plain(as_meant(config).schedule)) is fresh
    assert schedule_of(as_meant(config)).restart_at_edit is fresh


def test_a_plan_makes_no_scores(tmp_path: Path) -> None:
    """So that it needs no files of tasks: those of steps neither."""
    step = "{edit: remove, count: 1, importance: task_accuracy}"
    words = ["model=tiny", "schedule=mixed", f"schedule.steps=[{step}]", "schedule.tokens=64"]
    build.plan_without(compose_config(words)[0], tmp_path, UnavailableError("away"))
    assert [row["stage"] for row in json.loads((tmp_path / PLAN_FILE).read_text())] == ["teacher", "remove 0"]


def test_layers_are_chosen_with_the_runs_own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands beside the teacher's weights, and in steps too; one that is named stands."""
    monkeypatch.setenv("ISKD_CACHE", str(tmp_path / "cache"))
    task = "{edit: remove, count: 1, importance: {name: task_accuracy, tasks: [copy]}}"
    steps = ["schedule=mixed", f"schedule.steps=[{task}]", "importance=task_accuracy", "importance.tasks=[copy]"]
    config, _ = compose_config(["model=tiny", "data=sample", "trainer=cpu", "schedule.tokens=64", *steps])
    parts = build.parts(config, tmp_path / "run")
    run_lock.release(tmp_path / "run" / LOCK_FILE)
    assert [each.tokenizer is parts.teacher.tokenizer for each in parts.importances] == [True, True]
    named = TaskAccuracy(tasks=["copy"], tokenizer="somewhere")
    build.read_with(parts.teacher.tokenizer, [named, None], None)
    assert named.tokenizer == "somewhere"


@pytest.mark.parametrize("model", [["model=tiny"], ["model=local", "model.path=here"]])
def test_a_teacher_is_named_for_a_student_alone(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is none is its own teacher: another one would be dropped in silence."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    config, _ = compose_config([*model, "reference=phi1", "schedule.tokens=64"])
    with pytest.raises(ValueError, match=r"reference=phi1 names the teacher of a student .* is none"):
        build.parts(config, tmp_path / "run")
    config, _ = compose_config(["model=local", "model.path=here", "reference=here", "schedule.tokens=64"])
    with pytest.raises((ValueError, OSError), match=r"here"):
        build.parts(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("shared", "rates"),
    [
        ([], [(1e-4, 3e-4), (1e-4, 7e-4)]),
        (["schedule.lr=2e-5"], [(2e-5, 3e-4), (2e-5, 7e-4)]),
        (["schedule.lr_new=5e-5"], [(1e-4, 5e-5), (1e-4, 7e-4)]),
    ],
)
def test_rates_may_be_said_once_for_all_steps(shared: list[str], rates: list[tuple[float, float]]) -> None:
    """A step's own stand, and so does what trains."""
    steps = "schedule.steps=[{edit: remove, count: 1}, {edit: remove, count: 1, lr_new: 7e-4}]"
    words = ["model=tiny", "schedule=mixed", "schedule.tokens=64", "schedule.train=edited"]
    config = as_meant(compose_config([*words, steps, *shared])[0])
    parts = schedule_of(config).parts  # type: ignore[attr-defined]
    assert [(part.schedule.lr, part.schedule.lr_new) for part in parts] == rates
    assert {part.schedule.train for part in parts} == {"edited"}


@pytest.mark.parametrize("schedule", ["iterative", "oneshot", "align"])
@pytest.mark.parametrize(
    ("named", "edited"),
    [
        ("layers: [0, 1, 2, 3, 4, 5]", [0, 1, 2, 3, 4, 5]),
        ("layers: every_second", [1, 3, 5, 7, 9]),
        ("layers: [5, 4, 3], count: 2", [4, 5]),
    ],
)
def test_a_step_converts_all_layers_that_it_names(schedule: str, named: str, edited: list[int]) -> None:
    """Whatever number its schedule has where nobody says."""
    step = f"schedule.steps=[{{edit: convert, mixer: gla, schedule: {schedule}, {named}}}]"
    words = ["model=tiny", "schedule=mixed", "schedule.tokens=100", step]
    mixed = schedule_of(as_meant(compose_config(words)[0]))
    stages = forecast(mixed, History(Record(10), scores=dict.fromkeys(range(10), 0.0)))
    assert sorted(edit.layer for stage in stages for edit in stage.edits) == edited


def test_a_share_for_refits_needs_refits_in_a_step_as_in_a_run() -> None:
    said = "local_share=0.3 is for refits of the conversions, and there are none"
    words = [
        "model=tiny",
        "edit=convert",
        "mixer=gla",
        "schedule=align",
        "schedule.local_share=0.3",
        "schedule.tokens=64",
    ]
    with pytest.raises(ValueError, match=f"^schedule.{said}"):
        schedule_of(as_meant(compose_config(words)[0]))
    step, mixed = "{edit: convert, mixer: gla, layers: every_second, local_share: 0.3", ["model=tiny", "schedule=mixed"]
    mixed += ["schedule.tokens=64"]
    for refit, raises in (("", True), (", refit: [output]", False)):
        config = as_meant(compose_config([*mixed, f"schedule.steps=[{step}{refit}}}]"])[0])
        with pytest.raises(ValueError, match=said) if raises else nullcontext():
            schedule_of(config)


@pytest.mark.parametrize(
    ("refit", "made"),
    [
        ("output", [("Output", 32768)]),
        ("[{name: output, tokens: 8192}, local]", [("Output", 8192), ("Local", 32768)]),
        ("{name: local, tokens: 4096}", [("Local", 4096)]),
        ("none", []),
        ("[]", []),
    ],
)
def test_a_step_has_refits_with_keys_of_its_own(refit: str, made: list[tuple[str, int]]) -> None:
    words = ["model=tiny", "schedule=mixed", f"schedule.steps=[{{edit: remove, count: 1, refit: {refit}}}]"]
    config = as_meant(compose_config([*words, "schedule.tokens=64"])[0])
    [step] = schedule_of(config).parts  # type: ignore[attr-defined]
    assert [(type(each).__name__, each.tokens) for each in step.refits] == made


def test_a_key_that_a_steps_refit_has_not_is_told() -> None:
    step = "{edit: remove, count: 1, refit: [{name: output, token: 8192}]}"
    with pytest.raises(ValueError, match=r"schedule.steps\[0\].refit.token is no key \(did you mean tokens\?\)"):
        as_meant(compose_config(["model=tiny", "schedule=mixed", f"schedule.steps=[{step}]"])[0])
