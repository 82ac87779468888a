"""Several edits in one run (`schedule=mixed`), and runs that go on from the student of another (`model=RUN/model`).

Their text is of two sources (`data=mix`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from iskd.commands.compose import compose_config, parts
from iskd.evaluation import EvalSpec
from iskd.export import load
from iskd.models import Stack
from iskd.models.weights import model_tensors
from iskd.plan import Record, Spec, Stage
from iskd.plan.reading import record_from_json
from iskd.plan.results import write_stages
from iskd.plan.run_files import DATA_FILE, RECORD_FILE, learned_in
from iskd.schedules import History, next_stage
from iskd.schedules.edits import ConvertTo, RemoveLayers, ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.schedules.mixed import Mixed, Step
from iskd.schedules.oneshot import Oneshot
from iskd.training import Result, run
from iskd.training.facts import selected, write_data
from iskd.training.finish import along_the_run
from iskd.training.state import checkpoint_files
from tests.documents import ROOT
from tests.runs import At, Crash, crash, same, weights

REMOVE = RemoveLayers()
REPLACE = ReplaceWith(Spec("iskd.blocks.linear.Linear"))
CONVERT = ConvertTo(Spec("iskd.mixers.gla.GLA"))
TINY = [
    "model=tiny",
    "model.num_layers=6",
    "data=mix",
    "data.sources.large.data=sample",
    f"data.sources.small.path={ROOT / 'LICENSE'}",
    "data.sources.small.weight=2",
    "data.seq_len=32",
    "data.batch_size=2",
    "data.val_tokens=256",
]
QUICK = ["run.fit_tokens=128", "run.score_tokens=128", "run.efficiency_seconds=0", "run.samples=0", "run.mfu=false"]
QUICK += ["trainer=cpu", "trainer.precision=32-true", "trainer.progress=false", "run.movement_steps=2"]
STEPS = (
    "schedule.steps=[{edit: remove, count: 1, importance: block_influence, tokens: 512},"
    "{edit: replace, block: {name: slim, ratio: 0.4}, count: 1, refit: [output], tokens: 512, protect: [0]},"
    "{edit: convert, mixer: gated_deltanet, layers: every_second, tokens: 1024}]"
)


def play(schedule: Any, num_layers: int = 8, before: Record | None = None) -> list[Stage]:
    """All stages of a run, every layer with its number for a score."""
    record, stages = before or Record(num_layers), list[Stage]()
    begun = len(record.edits)
    while True:
        history = History(record, tuple(stages), {n: float(n) for n in record.layers}, before=begun)
        assert schedule.complete(history) == (next_stage(schedule, history) is None)
        stage = next_stage(schedule, history)
        if stage is None:
            return stages
        record = record.extended(stage.edits)
        stages.append(stage)


def edits(stages: list[Stage]) -> list[list[tuple[str, int]]]:
    return [[(edit.op, edit.layer) for edit in stage.edits] for stage in stages]


# ---- the schedule ---------------------------------------------------------------------------------------------------


def test_steps_edit_layers_of_their_own_within_their_own_budgets() -> None:
    schedule = Mixed(
        [
            Step(Iterative(REMOVE, count=2, tokens=100)),
            Step(Oneshot(REPLACE, count=2, tokens=30)),
            Step(Iterative(CONVERT, layers="every_second", per_stage=9, tokens=7)),
        ]
    )
    stages = play(schedule)
    assert edits(stages) == [
        [("remove", 0)],
        [("remove", 1)],
        [("replace", 2), ("replace", 3)],
        [("convert", 5), ("convert", 7)],
    ]
    assert [stage.step for stage in stages] == [0, 0, 1, 2]
    assert [stage.tokens for stage in stages] == [50, 50, 30, 7]


def test_the_target_of_a_step_is_about_the_whole_student_and_a_list_may_name_edited_layers() -> None:
    slim = ReplaceWith(Spec("iskd.blocks.slim.Slim", {"ratio": 0.5}))
    schedule = Mixed(
        [
            Step(Oneshot(slim, layers=[2, 3])),
            Step(Iterative(REMOVE, target_layers=6, order="middle_out")),
            Step(Oneshot(CONVERT, layers=[2])),
        ]
    )
    stages = play(schedule)
    assert edits(stages) == [[("replace", 2), ("replace", 3)], [("remove", 4)], [("remove", 5)], [("convert", 2)]]
    record = Record(8, tuple(edit for stage in stages for edit in stage.edits))
    assert len(record.layers) == 6


def test_a_plan_of_steps_to_come_needs_no_scores() -> None:
    schedule = Mixed([Step(Oneshot(REMOVE, count=2, order="middle_out")), Step(Oneshot(REPLACE, count=2))])
    history, ahead = History(Record(6)), list[Stage]()
    while (stage := next_stage(schedule, history)) is not None:
        ahead.append(stage)
        history = history.after(stage)
    assert [len(stage.edits) for stage in ahead] == [2, 2]


def test_a_schedule_counts_no_edits_from_before_it() -> None:
    before = Record(8).extended([*(edit for stage in play(Oneshot(REMOVE, count=2)) for edit in stage.edits)])
    assert edits(play(Iterative(REMOVE, count=2, tokens=4), before=before)) == [[("remove", 2)], [("remove", 3)]]
    assert edits(play(Oneshot(REPLACE, count=-1), before=before)) == [[("replace", n) for n in range(2, 8)]]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[]", r"schedule=mixed needs steps: e.g. schedule.steps=\[\{edit: remove"),
        ("[{count: 2}]", r"schedule.steps\[0\] names no edit: set its edit to one of convert, merge, remove, replace"),
        ("[remove]", r"schedule.steps\[0\]='remove': give keys, such as"),
        ("[{edit: remov}]", r"schedule.steps\[0\].edit='remov' is no choice .did you mean remove"),
        ("[{edit: remove, conut: 2}]", r"schedule.steps\[0\].conut is no key .did you mean count"),
        ("[{edit: replace, block: {name: slim, ration: 1}}]", r"schedule.steps\[0\].block.ration is no key"),
        ("[{edit: remove, schedule: mixed}]", r"schedule.steps\[0\].schedule=mixed: a step has no steps"),
        ("[{edit: remove, count: few}]", r"schedule.steps\[0\].schedule.count"),
    ],
)
def test_steps_that_cannot_work_are_refused(steps: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parts([*TINY, *QUICK, "schedule=mixed", f"schedule.steps={steps}"], tmp_path / "run")


def test_steps_without_a_budget_share_that_of_the_run(tmp_path: Path) -> None:
    steps = "[{edit: remove, count: 1}, {edit: replace, count: 1, tokens: 100}, {edit: convert, mixer: gla}]"
    made = parts([*TINY, *QUICK, "schedule=mixed", f"schedule.steps={steps}", "schedule.tokens=301"], tmp_path / "run")
    assert isinstance(made.schedule, Mixed)
    assert [step.schedule.tokens for step in made.schedule.parts] == [101, 100, 100]
    assert type(made.schedule.parts[2].schedule).__name__ == "Align"
    config, _ = compose_config(["schedule=mixed"])
    assert config.schedule.steps == []


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One student with all three edits, exported as `model_type: iskd`."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    return run(parts([*TINY, *QUICK, "schedule=mixed", STEPS, "loss=[kl]"], folder))


def test_one_run_removes_replaces_and_converts(mixed: Result) -> None:
    ops = [edit.op for edit in mixed.record.edits]
    assert ops[:2] == ["remove", "replace"]
    assert set(ops[2:]) == {"convert"}
    assert len({edit.layer for edit in mixed.record.edits}) == len(ops)
    assert [stage.name.split(":")[0].split()[0] for stage in mixed.stages[1:]] == [
        "remove",
        "replace",
        "mixers",
        "hidden",
        "end",
    ]
    assert any("refit output" in event for stage in mixed.stages if "replace" in stage.name for event in stage.events)
    assert not any("refit" in event for stage in mixed.stages if "remove" in stage.name for event in stage.events)
    first, second = (stage.scores for stage in mixed.stages[1:3])
    assert first is not None
    assert second is not None
    assert len(first) == 6
    assert len(second) == 5, "scored anew for the second step"
    assert mixed.model_dir is not None
    assert same(model_tensors(load(mixed.model_dir)), weights(mixed))


def test_a_mixed_run_goes_on_where_it_was_broken_off(mixed: Result, tmp_path: Path) -> None:
    keys = [*TINY, *QUICK, "schedule=mixed", STEPS, "loss=[kl]", "run.checkpoint_every=3", "export=false"]
    made = parts(keys, tmp_path / "run")
    made.callbacks.append(At(13, crash))
    with pytest.raises(Crash):
        run(made)
    again = run(parts(keys, tmp_path / "run", resume=True))
    assert again.record == mixed.record
    assert same(weights(again), weights(mixed))


def chained(folder: Path, student: Path, *keys: str) -> Any:
    others = [*TINY[2:], *QUICK, "schedule=oneshot", "schedule.tokens=256", "loss=[kl]"]
    return parts(["model=local", f"model.path={student}", *others, *keys], folder)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A student without two layers, which transformers alone can load."""
    keys = ["schedule=oneshot", "edit=remove", "schedule.count=2", "schedule.order=middle_out", "schedule.tokens=128"]
    return run(parts([*TINY, *QUICK, *keys], tmp_path_factory.mktemp("native") / "run"))


@pytest.mark.parametrize("kind", ["iskd", "native"])
def test_a_run_on_a_student_keeps_the_first_teacher_and_the_record(
    kind: str, mixed: Result, native: Result, tmp_path: Path
) -> None:
    before = mixed if kind == "iskd" else native
    assert before.model_dir is not None
    assert (json.loads((before.model_dir / "config.json").read_text())["model_type"] == "iskd") == (kind == "iskd")
    keys = ["edit=remove", "schedule.count=1", "schedule.order=middle_out"]
    made = chained(tmp_path / "run", before.model_dir, *keys, f"export={str(kind == 'iskd').lower()}")
    assert len(Stack(made.teacher.model).layers) == 6, "the original, not the cut student"
    result = run(made)
    assert result.record.edits[: len(before.record.edits)] == before.record.edits
    assert len(result.record.edits) == len(before.record.edits) + 1
    teacher, given, *_ = result.stages
    assert (teacher.name, teacher.retention, given.name) == ("teacher", 1.0, "as given")
    assert given.kl == pytest.approx(before.final.kl, rel=1e-3)
    assert [(edit["op"], edit["layer"]) for edit in given.edits] == [(e.op, e.layer) for e in before.record.edits]
    assert record_from_json(json.loads((tmp_path / "run" / RECORD_FILE).read_text())) == result.record
    if result.model_dir is not None:
        third = chained(tmp_path / "third", result.model_dir, *keys)
        assert len(Stack(third.teacher.model).layers) == 6, "over two runs"
        assert third.start == result.model_dir


def test_items_that_chose_layers_of_earlier_runs_stay_out(native: Result, tmp_path: Path) -> None:
    """Of a run on a student of a run on a student too, also where it is one that was kept of a stage."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(native.run_dir, first)
    assert native.model_dir is not None
    shutil.copytree(native.model_dir, first / "students" / "001")
    told = json.loads((first / DATA_FILE).read_text())
    (first / DATA_FILE).write_text(json.dumps({**told, "selection_sha256": {"piqa": ["ab"], "copy": ["cd"]}}))
    keys = ["edit=remove", "schedule.count=1", "importance=task_accuracy", "importance.tasks=[copy]"]
    made = chained(second, first / "students" / "001", *keys, "importance.items=4")
    own = [item.sha256 for item in made.importance.selection["copy"]]
    assert selected(*made.importances, start=made.start) == {"piqa": ["ab"], "copy": ["cd", *own]}
    write_data(made)
    shutil.copytree(first / "model", second / "model")
    write_stages(second, native.stages)
    third = chained(tmp_path / "third", second / "model", "edit=remove", "schedule.count=1", "importance=bi_veto")
    assert selected(*third.importances, start=third.start) == {"piqa": ["ab"], "copy": ["cd", *own]}
    assert along_the_run(third, EvalSpec(["copy"]))._exclude == ["ab", "cd", *own]


def test_text_to_report_on_is_held_against_that_of_earlier_runs(
    native: Result, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a run on a student of a run on a student, each trained on other text."""
    new, part = tmp_path / "new.txt", tmp_path / "part.txt"
    new.write_text("\n\n".join(hashlib.sha256(bytes([number])).hexdigest() for number in range(256)))
    part.write_text("No file that was trained on. " + (ROOT / "LICENSE").read_text())
    second, third = tmp_path / "second", tmp_path / "third"
    keys = [*QUICK, "data.seq_len=32", "data.val_tokens=256", "schedule=oneshot", "edit=remove", "schedule.count=1"]
    keys += ["data.validation_fraction=0.2", "data.calibration_fraction=0.2"]

    def made(folder: Path, student: Path | None, *more: str) -> Any:
        text = ["data=text", f"data.path={new}", "importance=bi_veto", "loss=[kl]"]
        return parts(["model=local", f"model.path={student}", *keys, *text, *more], folder)

    write_data(made(second, native.model_dir))
    write_stages(second, native.stages)
    shutil.copytree(native.run_dir / "model", second / "model")
    first, other = (json.loads((folder / DATA_FILE).read_text()) for folder in (native.run_dir, second))
    assert [text.cache for text in learned_in(second)] == [first["cache"], other["cache"]]
    assert other["before"] == [{"content": first["content"], "cache": first["cache"]}]

    made(third, second / "model").data.prepare()
    assert not caplog.records
    made(tmp_path / "validated", second / "model", f"data.val_path={part}").data.prepare()
    assert "88 % of the passages of the validation text are in what the student trains" in caplog.text
    asked = ["eval=quick", "eval.tasks=[]"]
    with pytest.raises(
        ValueError, match=r"[89]\d\.\d % of the passages of eval.text=.*report on text that it never sees"
    ):
        made(tmp_path / "asked", second / "model", *asked, f"eval.text={part}")
    (second / DATA_FILE).write_text(json.dumps({**other, "before": [{"cache": "../" + first["cache"]}]}))
    made(tmp_path / "elsewhere", second / "model").data.prepare()
    assert "is not at hand" in caplog.text
    (second / DATA_FILE).write_text(json.dumps({**other, "before": [{"content": 1}]}))
    with pytest.raises(ValueError, match="content and cache must be strings"):
        made(tmp_path / "damaged", second / "model")


def test_a_chained_run_can_be_taken_up(mixed: Result, tmp_path: Path) -> None:
    assert mixed.model_dir is not None
    keys = ["edit=remove", "schedule.count=1", "schedule.order=middle_out", "run.checkpoint_every=1", "export=false"]
    whole = run(chained(tmp_path / "whole", mixed.model_dir, *keys))
    broken = chained(tmp_path / "run", mixed.model_dir, *keys)
    broken.callbacks.append(At(3, crash))
    with pytest.raises(Crash):
        run(broken)
    assert checkpoint_files.newest(tmp_path / "run" / "checkpoints") is not None
    others = [*TINY[2:], *QUICK, "schedule=oneshot", "schedule.tokens=256", "loss=[kl]", *keys]
    again = run(parts(["model=local", f"model.path={mixed.model_dir}", *others], tmp_path / "run", resume=True))
    assert same(weights(again), weights(whole))
    assert again.record == whole.record


def test_another_teacher_can_be_named(mixed: Result, native: Result, tmp_path: Path) -> None:
    assert native.model_dir is not None
    keys = ["edit=remove", "schedule.count=1", "schedule.order=middle_out", "export=false"]
    alone = chained(tmp_path / "alone", native.model_dir, *keys, f"reference={native.model_dir}")
    assert len(Stack(alone.teacher.model).layers) == 4, "the student itself is the teacher"
    assert alone.start is None
    moved = tmp_path / "moved"
    shutil.copytree(native.model_dir, moved)
    with pytest.raises(ValueError, match=r"which teacher\? nothing here says where it is; .*reference=DIR_OR_NAME"):
        chained(tmp_path / "lost", moved, *keys)
    assert mixed.model_dir is not None
    with pytest.raises(ValueError, match=r"is the student of a teacher with 6 layers, and the teacher here has 4"):
        run(chained(tmp_path / "other", mixed.model_dir, *keys, f"reference={native.model_dir}"))
