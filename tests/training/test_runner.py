"""One whole run on a tiny model: the stage loop, resume after a crash anywhere, the floor, faults, export."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor
from transformers import AutoModelForCausalLM

import iskd
from iskd.losses.ce import CrossEntropy
from iskd.models import surgery
from iskd.models.weights import model_tensors
from iskd.plan import Spec
from iskd.plan.results import read_stages
from iskd.schedules.edits import RemoveLayers, ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.schedules.none import NoEdits
from iskd.schedules.oneshot import Oneshot
from iskd.system import Preempted
from iskd.system.faults import NonFiniteError, UnfinishedError
from iskd.system.stop_signals import EXIT_CODE
from iskd.teacher import Loaded
from iskd.training.callback import CompressionCallback
from iskd.training.editing import BrokenOffError
from iskd.training.parts import Parts, Result
from iskd.training.runner import run
from iskd.training.stages import StageLoop
from iskd.training.state import checkpoint, checkpoint_files
from iskd.training.step import module as step_module
from tests.factories import tiny
from tests.runs import SLIM, TOKENS, At, Crash, crash, interrupt, make_parts, metric_rows, same, weights, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    return partial(make_parts, text=text, cache=tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="module")
def uninterrupted(make: Callable[..., Parts], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(make(tmp_path_factory.mktemp("runs") / "whole"))


def test_run_writes_what_users_read(uninterrupted: Result) -> None:
    names = [stage.name for stage in uninterrupted.stages]
    assert names == ["teacher", "replace 2", "replace 1"]
    teacher, _, last = uninterrupted.stages
    assert teacher.kl == pytest.approx(0, abs=1e-6)
    assert teacher.retention == 1
    assert last.tokens == 12 * TOKENS
    assert last.params == surgery.parameters(uninterrupted.student) < teacher.params
    folder = uninterrupted.run_dir
    assert [s.name for s in read_stages(folder)] == names
    for name in ("record.json", "data.json", "environment.json", "metrics.csv", "plan.json", "report.html"):
        assert (folder / name).stat().st_size, name
    data = json.loads((folder / "data.json").read_text())
    assert data["calibration_sha256"].keys() == {"128", "160"}, "what scores read, and fits with what chooses"
    assert data["selection_sha256"] == {}, "no task chose a layer"
    plan = json.loads((folder / "plan.json").read_text())
    assert [row["params"] for row in plan] == [stage.params for stage in uninterrupted.stages], (
        "the plan's sizes are exact"
    )
    assert len(list((folder / "checkpoints").iterdir())) == 2, "the last two checkpoints are kept"


CRASHES = [
    ("batch", 1),
    ("batch", 5),
    ("batch", 9),
    ("batch", 13),
    ("batch", 24),
    ("edit", 0),
    ("edit", 1),
    ("fit", 1),
    ("save", 0),
    ("save", 3),
    ("rename", 2),
    ("validation", 2),
    ("validation", 4),
]


@pytest.mark.parametrize(("place", "number"), CRASHES)
def test_resume_after_a_crash_is_bitwise_exact(
    place: str,
    number: int,
    make: Callable[..., Parts],
    tmp_path: Path,
    uninterrupted: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = make(tmp_path / "crashed")
    with monkeypatch.context() as patch:
        if place == "batch":
            parts.callbacks.append(At(number, crash))
        else:
            interrupt(patch.setattr, place, number, crash)
        with pytest.raises(Crash):
            run(parts)
    metrics = tmp_path / "crashed" / "metrics.csv"
    if metrics.is_file():
        with metrics.open("a") as file:  # one line is foreign, the last is torn
            file.write("7,7\n1,2")
    resumed = run(make(tmp_path / "crashed", resume=True))
    assert metric_rows(tmp_path / "crashed") == metric_rows(uninterrupted.run_dir), (
        "no row is lost and none is there twice"
    )
    assert resumed.student.generation_config.to_dict() == uninterrupted.student.generation_config.to_dict()
    assert same(weights(resumed), weights(uninterrupted))
    assert resumed.record == uninterrupted.record
    for a, b in zip(resumed.stages, uninterrupted.stages, strict=True):
        assert (a.name, a.ppl, a.kl, a.retention, a.tokens, a.before) == (
            b.name,
            b.ppl,
            b.kl,
            b.retention,
            b.tokens,
            b.before,
        )


def test_resume_of_a_finished_run_changes_nothing(make: Callable[..., Parts], uninterrupted: Result) -> None:
    again = run(make(uninterrupted.run_dir, resume=True))
    assert same(weights(again), weights(uninterrupted))
    assert again.stages == uninterrupted.stages


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_torn_checkpoint_is_skipped_with_a_warning(
    damage: str,
    make: Callable[..., Parts],
    tmp_path: Path,
    uninterrupted: Result,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts = make(tmp_path / "torn")
    parts.callbacks.append(At(21, crash))
    with pytest.raises(Crash):
        run(parts)
    newest = checkpoint_files.newest(tmp_path / "torn" / "checkpoints")
    assert newest is not None
    victim = newest / ("manifest.json" if damage == "manifest" else "student.safetensors")
    content = victim.read_bytes()
    if damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(
            content[: len(content) // 2] if damage in ("truncate", "manifest") else content[:-1] + b"\xff"
        )
    resumed = run(make(tmp_path / "torn", resume=True))
    assert "is skipped" in caplog.text
    assert same(weights(resumed), weights(uninterrupted))


@pytest.fixture(scope="module")
def learnt(make: Callable[..., Parts], tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A teacher that has learnt the text, so that taking a block out hurts."""
    folder = tmp_path_factory.mktemp("runs") / "learn"
    parts = make(folder, schedule=NoEdits(tokens=60 * TOKENS, lr=3e-3), terms={"ce": (CrossEntropy(), 1.0)})
    return replace(parts.teacher, model=run(parts).student.eval())


def test_floor_rolls_back_weights_record_and_optimizer(
    make: Callable[..., Parts], learnt: Loaded, tmp_path: Path
) -> None:
    """The first stage is harmless, the second takes a block out: the run ends with the student of the first."""
    schedule = Iterative(RemoveLayers(), layers=[2, 0], tokens=4 * TOKENS, lr=1e-3)
    first = run(
        make(tmp_path / "first", schedule=Iterative(RemoveLayers(), layers=[2], tokens=2 * TOKENS), teacher=learnt)
    )
    both = run(make(tmp_path / "both", schedule=schedule, teacher=learnt))
    good, bad = both.stages[1].retention, both.stages[2].retention
    assert bad < good
    schedule = replace(schedule, floor=(good + bad) / 2)
    result = run(make(tmp_path / "floor", schedule=schedule, teacher=learnt))
    assert [stage.status for stage in result.stages] == ["kept", "kept", "rolled_back"]
    assert "below schedule.floor" in " ".join(result.stages[-1].events)
    assert result.record == first.record
    assert result.final.name == "remove 2"
    assert result.student.config.num_hidden_layers == 3
    newest = checkpoint_files.newest(tmp_path / "floor" / "checkpoints")
    assert newest is not None
    boundary = [path for path in (tmp_path / "floor" / "checkpoints").iterdir() if path != newest]
    optimizer = (newest / "optimizer.safetensors").read_bytes()
    assert any((path / "optimizer.safetensors").read_bytes() == optimizer for path in boundary)
    assert any(
        (path / "student.safetensors").read_bytes() == (newest / "student.safetensors").read_bytes()
        for path in boundary
    )
    assert checkpoint.read_state(newest).stage is None
    again = run(make(tmp_path / "floor", schedule=schedule, teacher=learnt, resume=True))
    assert same(weights(again), weights(result))
    # a floor far below what the stage has, and the last step leaves weights that are nan: no quality passes no floor
    parts = make(tmp_path / "nan", schedule=replace(schedule, floor=1e-9), teacher=learnt)
    parts.callbacks.append(At(8, poison))
    broken = run(parts)
    assert [stage.status for stage in broken.stages] == ["kept", "kept", "rolled_back"]
    assert "retention nan is no quality for schedule.floor" in " ".join(broken.stages[-1].events)
    assert same(weights(broken), weights(result))
    parts = make(tmp_path / "broken", schedule=replace(schedule, floor=None), teacher=learnt)
    parts.callbacks.append(At(8, poison))
    with pytest.raises(NonFiniteError, match=r"the student broke \(perplexity nan.*lower schedule\.lr"):
        run(parts)


def test_floor_missed_after_a_resume_inside_the_stage(
    make: Callable[..., Parts], learnt: Loaded, tmp_path: Path
) -> None:
    schedule = Iterative(RemoveLayers(), layers=[2, 0], tokens=12 * TOKENS, lr=1e-3, floor=1e-6)
    parts = make(tmp_path / "floor", schedule=schedule, teacher=learnt)
    parts.callbacks.append(At(21, crash))
    with pytest.raises(Crash):
        run(parts)
    newest = checkpoint_files.newest(tmp_path / "floor" / "checkpoints")
    assert newest is not None
    assert newest.name.endswith(checkpoint_files.STAGE)
    schedule = replace(schedule, floor=1.0)
    result = run(make(tmp_path / "floor", schedule=schedule, teacher=learnt, resume=True))
    assert result.stages[-1].status == "rolled_back"
    assert [edit.layer for edit in result.record.edits] == [2]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_untouched_student_has_no_distance_to_its_teacher(
    precision: str, make: Callable[..., Parts], tmp_path: Path
) -> None:
    parts = make(tmp_path / precision, dropout=0.0)
    parts = replace(parts, trainer={**parts.trainer, "precision": precision})
    teacher = run(replace(parts, options=replace(parts.options, plan_only=True))).stages[0]
    assert (teacher.kl, teacher.top1, teacher.retention) == (pytest.approx(0, abs=1e-7), 1.0, 1.0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_schedule_spends_the_same_budget(count: int, make: Callable[..., Parts], tmp_path: Path) -> None:
    """A budget that no stage divides evenly is rounded once, not stage by stage."""
    schedule = Iterative(ReplaceWith(SLIM), layers=[2, 1, 0][:count], tokens=round(4.4 * TOKENS), final_share=0.3)
    result = run(make(tmp_path / "budget", schedule=schedule))
    assert result.final.tokens == 4 * TOKENS
    plan = json.loads((tmp_path / "budget" / "plan.json").read_text())
    assert sum(row["tokens"] for row in plan) == 4 * TOKENS


def test_stages_without_tokens_edit_and_measure(make: Callable[..., Parts], tmp_path: Path) -> None:
    schedule = Oneshot(
        ReplaceWith(Spec("iskd.blocks.slim.Slim", {"ratio": 0.7, "select": "l1"}), fit=False),
        count=-1,
        tokens=0,
        order="middle_out",
    )
    result = run(make(tmp_path / "zero", schedule=schedule))
    assert [stage.tokens for stage in result.stages] == [0, 0]
    assert len(result.record.edits) == 4


def test_removal_and_importance_order(make: Callable[..., Parts], tmp_path: Path) -> None:
    schedule = Iterative(RemoveLayers(), count=2, tokens=4 * TOKENS, train="adjacent", rescore=True)
    result = run(make(tmp_path / "remove", schedule=schedule, export=True))
    assert result.student.config.num_hidden_layers == 2
    assert result.stages[1].scores is not None
    chosen = [edit.layer for edit in result.record.edits]
    first = result.stages[1].scores
    assert chosen[0] == min(range(4), key=lambda layer: first[str(layer)])
    assert set(result.stages[2].scores or ()) == {str(layer) for layer in range(4) if layer != chosen[0]}


def test_plan_only_stops_before_the_first_step(make: Callable[..., Parts], tmp_path: Path, capsys: Any) -> None:
    parts = make(tmp_path / "plan")
    before = {name: value.clone() for name, value in model_tensors(parts.teacher.model).items()}
    result = run(replace(parts, options=replace(parts.options, plan_only=True)))
    assert same(weights(result), before)
    assert not (tmp_path / "plan" / "checkpoints").exists()
    assert "replace 2" in capsys.readouterr().out


def test_a_plan_starts_no_process_and_counts_those_of_the_run(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def started(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", started)
    steps = {}
    for number, strategy in ((1, "auto"), (2, "ddp"), (4, "fsdp")):
        layout = {"accelerator": "cpu", "devices": number, "strategy": strategy}
        parts = make(tmp_path / strategy, trainer=layout, options={"plan_only": True}, accumulate=1)
        run(parts)
        rows = json.loads((parts.run_dir / "plan.json").read_text())
        steps[number] = [row["steps"] for row in rows]
        assert json.loads((parts.run_dir / "environment.json").read_text())["processes"] == number
        shown = " ".join(capsys.readouterr().out.split())
        assert (f"x {number} processes (a plan starts none" in shown) == (number > 1)
    assert any(steps[1])
    assert steps[1] == [2 * each for each in steps[2]] == [4 * each for each in steps[4]]
    few = make(tmp_path / "few", trainer={"accelerator": "cpu", "devices": 8}, options={"plan_only": True})
    few.data.val_tokens = few.data.seq_len * 7
    with pytest.raises(ValueError, match="gives 7 windows for 8 processes"):
        run(few)


def poison(module: Any) -> None:
    """Make one weight of the student not a number."""
    with torch.no_grad():
        next(module.student.parameters()).fill_(float("nan"))


def test_non_finite_loss_names_step_and_last_good_checkpoint(make: Callable[..., Parts], tmp_path: Path) -> None:
    parts = make(tmp_path / "nan")
    parts.callbacks.append(At(7, poison))
    with pytest.raises(
        NonFiniteError, match=r"at \d+ tokens, stage 1 \(replace 2\)\. Last good checkpoint: .*checkpoints"
    ):
        run(parts)
    newest = checkpoint_files.newest(tmp_path / "nan" / "checkpoints")
    assert newest is not None
    fresh = surgery.rebuild(tiny("llama", vocab=257), checkpoint.read_state(newest).record)
    checkpoint.restore(newest, fresh, None)
    assert all(value.isfinite().all() for value in model_tensors(fresh).values())


def test_full_disk_is_named_and_loses_nothing(
    make: Callable[..., Parts], tmp_path: Path, uninterrupted: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = checkpoint.save_file, iter(range(1000))

    def full(tensors: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        if next(calls) >= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match=r"the disk is full.*Earlier checkpoints are intact.*resume="):
            run(make(tmp_path / "full"))
    assert not list((tmp_path / "full" / "checkpoints").glob(".draft*"))
    resumed = run(make(tmp_path / "full", resume=True))
    assert same(weights(resumed), weights(uninterrupted))


def test_resume_refuses_other_data(make: Callable[..., Parts], tmp_path: Path) -> None:
    parts = make(tmp_path / "other")
    parts.callbacks.append(At(5, crash))
    with pytest.raises(Crash):
        run(parts)
    changed = make(tmp_path / "other", resume=True)
    changed.data.seed = 3
    with pytest.raises(ValueError, match=r"made with seed=0, now it is 3"):
        run(changed)
    rounded = make(tmp_path / "other", resume=True, trainer={"precision": "bf16-mixed"})
    with pytest.raises(ValueError, match=r"made with precision='32-true', now it is 'bf16-mixed'"):
        run(rounded)
    other = make(tmp_path / "other", resume=True)
    weights_of_another = replace(other.teacher, source={"name": "llama", "sha256": "f00"})
    with pytest.raises(ValueError, match=r"made with teacher=None, now it is 'f00'"):
        run(replace(other, teacher=weights_of_another))


def test_resume_refuses_a_checkpoint_of_another_teacher(make: Callable[..., Parts], uninterrupted: Result) -> None:
    parts = make(uninterrupted.run_dir, resume=True)
    other = Loaded(tiny("llama", vocab=257, layers=3), parts.teacher.tokenizer, {"name": "other"})
    with pytest.raises(ValueError, match="teacher with 4 layers"):
        run(replace(parts, teacher=other))


def test_new_block_that_cannot_move_is_an_error(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(optimizer: torch.optim.Optimizer, *_: Any) -> list[str]:
        """An edit that changes only the module: the silent failure that the check is for."""
        return []

    monkeypatch.setattr(step_module, "regroup", forget)
    with pytest.raises(RuntimeError, match="optimizer"):
        run(make(tmp_path / "silent"))


@pytest.mark.parametrize("family", ["gpt2", "phi", "qwen2", "llama"])
def test_every_family_runs_exports_and_reloads(family: str, make: Callable[..., Parts], tmp_path: Path) -> None:
    schedule = Iterative(ReplaceWith(SLIM), layers=[1, 3], per_stage=2, tokens=2 * TOKENS)
    parts = make(tmp_path / family, family=family, schedule=schedule, export=family == "gpt2")
    result = run(parts)
    if result.model_dir is None:
        from iskd.export.student import write

        result = replace(result, model_dir=tmp_path / family / "model")
        assert result.model_dir is not None
        write(result.model_dir, result.student, result.record, parts.teacher.model.config, parts.teacher.tokenizer)
    assert result.model_dir is not None
    student = result.student.eval()
    ids = torch.arange(3, 15).unsqueeze(0)
    for model in (iskd.load(result.model_dir), AutoModelForCausalLM.from_pretrained(result.model_dir)):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, student(ids).logits)
        kwargs: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **kwargs), student.generate(ids, **kwargs))


def test_surviving_adamw_state_is_kept_through_an_edit(make: Callable[..., Parts], tmp_path: Path) -> None:
    seen: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = []

    original = StageLoop.edit

    def around(self: StageLoop) -> None:
        before = {id(p): state["exp_avg"].clone() for p, state in self.live.optimizer.state.items()}
        original(self)
        after = {id(p): state["exp_avg"].clone() for p, state in self.live.optimizer.state.items()}
        seen.append((before, after))

    parts = make(tmp_path / "state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLoop, "edit", around)
        run(parts)
    before, after = seen[-1]
    assert before
    kept = before.keys() & after.keys()
    assert after.keys() <= before.keys(), "new parameters start without state"
    assert len(kept) < len(before), "the replaced block's state is forgotten"
    assert all(torch.equal(before[key], after[key]) for key in kept)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import logging

    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


# ---- whoever ends the training, the run says so ---------------------------------------------------------------------


class Stop(Callback):
    """Ends the fit from a hook, as EarlyStopping and Timer do."""

    def __init__(self, hook: str, call: int) -> None:
        self.left, self.exits = call, hook == "on_train_batch_start"
        setattr(self, hook, self.stop)

    def stop(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.left -= 1
        if not self.left and self.exits:
            raise SystemExit  # as Lightning's own handler of SIGTERM has it: code 0
        if not self.left:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("hook", "call", "says"),
    [
        ("on_train_batch_end", 4, "stage 1 of 2 .* after 2 of 6 steps"),
        ("on_train_epoch_end", 1, "stage 2 of 2 .* after 0 of 6 steps"),
        ("on_train_batch_end", 16, "stage 2 of 2 .* after 2 of 6 steps"),
        ("on_train_batch_start", 4, "stage 1 of 2 .* after 1 of 6 steps"),
    ],
)
def test_a_fit_that_ends_inside_the_schedule_is_an_error_and_resumes(
    hook: str, call: int, says: str, make: Callable[..., Parts], tmp_path: Path, uninterrupted: Result
) -> None:
    folder = tmp_path / "cut"
    parts = make(folder, export=True)
    parts.callbacks.append(Stop(hook, call))
    with pytest.raises(UnfinishedError, match=f"INCOMPLETE.*{says}.*resume={folder}"):
        run(parts)
    assert not (folder / "model").exists(), "nothing is exported"
    assert all(stage.name in ("teacher", "replace 2") for stage in read_stages(folder)), "no cut stage is kept"
    assert same(weights(run(make(folder, resume=True))), weights(uninterrupted))


def test_a_limit_in_the_environment_is_found_too(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_TRAINER_LIMIT_TRAIN_BATCHES", "2")
    with pytest.raises(UnfinishedError, match="after 1 of 6 steps"):
        run(make(tmp_path / "cut"))


def test_limits_of_the_trainer_are_refused_before_anything_is_read(make: Callable[..., Parts], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_steps=3 .*schedule\.tokens"):
        run(make(tmp_path / "a", trainer={"max_steps": 3}))
    scheduler = GradientAccumulationScheduler({0: 2})
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches"):
        run(make(tmp_path / "b", callbacks=[scheduler]))
    assert not (tmp_path / "a" / "stages.json").exists()
    for key, value in {"devices": "x", "profiler": "nothing", "strategy": "nothing"}.items():
        with pytest.raises(ValueError, match=f"trainer.{key}={value}.*: Lightning refuses that here: .*"):
            run(make(tmp_path / key, trainer={key: value}))


def test_a_time_limit_breaks_off_no_work_that_would_begin_anew() -> None:
    """Of several processes neither: it ends at the next step; a signal ends it now."""
    ranks = SimpleNamespace(size=2, highest=lambda votes: votes)
    callback = CompressionCallback(cast(Any, None), deadline=0.0)
    callback.ranks = cast(Any, ranks)
    assert callback.stop_wanted()
    with callback._breaking_off():
        callback._look()
    callback.stop_signals._note(signal.SIGTERM, None)
    with pytest.raises(BrokenOffError):
        callback._look()


def test_max_time_saves_and_stops_as_a_signal_does(
    make: Callable[..., Parts], tmp_path: Path, uninterrupted: Result
) -> None:
    folder = tmp_path / "timed"
    for session in (1, 2):
        with pytest.raises(Preempted) as stop:
            run(make(folder, resume=session > 1, trainer={"max_time": {"milliseconds": 1}}))
        assert stop.value.code == EXIT_CODE
        assert f"stopped by trainer.max_time, everything is saved: continue with resume={folder}" in stop.value.message
        newest = checkpoint_files.newest(folder / "checkpoints")
        assert newest is not None
        assert checkpoint.read_state(newest).tokens >= (session - 1) * TOKENS, "a session trains a step at least"
    assert same(weights(run(make(folder, resume=True, trainer={"max_time": "00:01:00:00"}))), weights(uninterrupted))
    once = Oneshot(RemoveLayers(), count=1, tokens=TOKENS, restart_at_edit=True)
    with pytest.raises(ValueError, match=r"trainer\.max_time .*restart_at_edit"):
        run(make(tmp_path / "fresh", schedule=once, trainer={"max_time": "00:01:00:00"}))
