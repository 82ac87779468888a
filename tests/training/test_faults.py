"""What goes wrong in the middle of a run on one process: numbers, memory, disks, foreign checkpoints, settings."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from iskd.models import surgery
from iskd.models.weights import model_tensors
from iskd.plan.options import RunOptions
from iskd.system.faults import NonFiniteError, advice, is_out_of_memory
from iskd.training.parts import Parts, Result
from iskd.training.runner import run
from iskd.training.state import RunState, checkpoint, checkpoint_files
from iskd.training.step import DistillModule
from iskd.training.step.module import StepResult
from iskd.training.strategies import FSDP2Strategy, check_processes, check_strategy, starts_processes
from tests.factories import tiny
from tests.runs import (
    At,
    Crash,
    crash,
    interrupt,
    largest_difference,
    make_parts,
    metric_rows,
    same,
    weights,
    write_text,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    return partial(make_parts, text=text, cache=tmp_path_factory.getbasetemp() / "cache", dropout=0.0)


def break_steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Tensor, StepResult], StepResult]) -> None:
    """Pass the result of every step, with its number, through `act`."""
    original, numbers = DistillModule.step, iter(range(100_000))

    def step(self: DistillModule, input_ids: Tensor, *rest: Any) -> StepResult:
        return act(next(numbers), input_ids, original(self, input_ids, *rest))

    monkeypatch.setattr(DistillModule, "step", step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    value: float, make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite loss with finite gradients too; weights and moments stay as they are, and the run goes on."""
    break_steps(monkeypatch, lambda n, _, r: StepResult(r.loss + value, r.terms) if n == 8 else r)
    before: list[dict[str, Tensor]] = []
    parts = make(tmp_path / "run")
    for batch in (6, 8):  # the poisoned micro-batch is the first of the fourth step (two calls are the plan's)
        parts.callbacks.append(
            At(batch, lambda m: before.append({k: v.clone() for k, v in model_tensors(m.student).items()}))
        )
    result = run(parts)
    assert same(before[0], before[1])
    assert [stage.status for stage in result.stages] == ["kept"] * 3
    assert "step 4 skipped" in " ".join(result.stages[1].events)
    newest = checkpoint_files.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    state = checkpoint.read_state(newest)
    assert (state.skipped, state.skipped_in_a_row) == (1, 0)


def test_steps_that_stay_not_finite_end_the_run(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, lambda n, _, r: StepResult(r.loss * float("nan"), r.terms) if n > 7 else r)
    with pytest.raises(
        NonFiniteError, match=r"in 3 optimizer steps in a row \(run.max_skipped=2\) at \d+ tokens.*Last good"
    ):
        run(make(tmp_path / "run", options={"max_skipped": 2}))


def test_weights_that_are_not_finite_are_never_saved(make: Callable[..., Parts], tmp_path: Path) -> None:
    parts = make(tmp_path / "run", options={"max_skipped": 50, "checkpoint_every": 1})

    def poison(module: Any) -> None:
        with torch.no_grad():
            next(module.student.parameters()).fill_(float("nan"))

    parts.callbacks.append(At(4, poison))
    with pytest.raises(
        NonFiniteError, match=r"a weight of the student is not finite at .* Last good checkpoint: .*000"
    ):
        run(parts)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(value.isfinite().all() for value in checkpoint.Stored(path, "student").values())


def out_of_memory(above: int, first: int) -> Callable[[int, Tensor, StepResult], StepResult]:
    """Steps on more than `above` windows use up the memory from call `first` on."""

    def act(number: int, input_ids: Tensor, result: StepResult) -> StepResult:
        if number >= first and len(input_ids) > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return result

    return act


def test_out_of_memory_says_what_to_turn(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, out_of_memory(above=1, first=9))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        run(make(tmp_path / "run"))
    for knob in (
        "data.batch_size=2",
        "data.seq_len=32",
        "accumulate_grad_batches",
        "run.on_oom=halve",
        "trainer=fsdp",
        "resume=",
    ):
        assert knob in str(raised.value)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert "start again" in advice(MemoryError(), "at 0 tokens", {}, None)


@pytest.mark.parametrize("first", [0, 9])
def test_out_of_memory_halves_the_micro_batch_and_goes_on(
    first: int, make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first step or in the middle of a stage: the end is that of a run which had small ones all along."""
    small = run(make(tmp_path / "small", batch_size=1, accumulate=4))
    with monkeypatch.context() as patch:
        break_steps(patch, out_of_memory(above=1, first=first))
        halved = run(make(tmp_path / "halved", options={"on_oom": "halve"}))
    assert largest_difference(weights(halved), weights(small)) < 1e-5
    assert [stage.tokens for stage in halved.stages] == [stage.tokens for stage in small.stages]
    events = " ".join(event for stage in halved.stages for event in stage.events)
    assert ("'batch_size': 1" in events) == (first > 0)


EVERY_FOURTH = {"log_every_n_steps": 4}  # of the run's steps, wherever a process began


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    return run(
        make_parts(folder / "run", text, tmp_path_factory.getbasetemp() / "cache", dropout=0.0, trainer=EVERY_FOURTH)
    )


@pytest.mark.parametrize("place", ["loader", 1, 11, 12, 23, 24, "validation"])
def test_a_signal_anywhere_saves_and_the_run_goes_on(
    place: int | str, make: Callable[..., Parts], tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In and at the ends of both stages (12 micro-batches each), and while one is measured; bit for bit, as always.

    Who goes on at the end of a stage is killed in its midst: after the stage's rows, before the checkpoint.
    """
    make = partial(make, trainer=EVERY_FOURTH)
    parts = make(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        if isinstance(place, int):
            parts.callbacks.append(At(place, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
        else:
            interrupt(patch.setattr, place, 2 * (place == "validation"), lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            run(parts)
    assert stop.value.code == 143
    if place in (11, 23):  # before the last micro-batch of a stage: saved at its end
        with monkeypatch.context() as patch:
            interrupt(patch.setattr, "save", 0, crash)
            with pytest.raises(Crash):
                run(make(tmp_path / "stopped", resume=True))
    resumed = run(make(tmp_path / "stopped", resume=True))
    assert metric_rows(tmp_path / "stopped") == metric_rows(whole.run_dir)
    assert same(weights(resumed), weights(whole))
    assert [(s.name, s.ppl, s.tokens) for s in resumed.stages] == [(s.name, s.ppl, s.tokens) for s in whole.stages]


def test_a_run_leaves_the_signals_as_it_found_them(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that fails, or goes on with less: otherwise the process would ignore SIGTERM ever after."""
    before = signal.getsignal(signal.SIGTERM)
    run(make(tmp_path / "good"))
    break_steps(monkeypatch, out_of_memory(above=1, first=9))
    run(make(tmp_path / "halved", options={"on_oom": "halve"}))
    with pytest.raises(torch.OutOfMemoryError):
        run(make(tmp_path / "bad"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_halved_run_resumes_halved_and_keeps_its_wandb_run(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    parts = make(tmp_path / "run", options={"on_oom": "halve"})
    parts.loggers.append(WandbLogger(save_dir=str(tmp_path), offline=True))
    with monkeypatch.context() as patch:
        break_steps(patch, out_of_memory(above=1, first=9))
        parts.callbacks.append(At(20, crash))
        with pytest.raises(Crash):
            run(parts)
    steps: list[int] = []
    break_steps(monkeypatch, lambda _, ids, result: (steps.append(len(ids)), result)[1])
    run(make(tmp_path / "run", options={"on_oom": "halve"}, resume=True))
    assert set(steps) == {1}, "it does not run out of memory once more"
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_out_of_memory_with_one_window_is_the_end(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, out_of_memory(above=0, first=5))
    with pytest.raises(torch.OutOfMemoryError, match=r"data.batch_size=1"):
        run(make(tmp_path / "run", options={"on_oom": "halve"}))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_named(
    number: int, make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any user would meet it; the tests may run as root, whom no mode stops."""
    original, calls = Path.mkdir, iter(range(1000))

    def refused(self: Path, *args: Any, **kwargs: Any) -> None:
        if ".draft-" in self.name and next(calls) >= 2:
            raise OSError(number, "Read-only file system", str(self))
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        with pytest.raises(
            OSError, match=r"could not write the checkpoint .*Read-only.*make the folder writable.*resume="
        ):
            run(make(tmp_path / "run"))
    resumed = run(make(tmp_path / "run", resume=True))
    assert same(weights(resumed), weights(run(make(tmp_path / "whole"))))


def test_a_checkpoint_of_another_model_is_refused(make: Callable[..., Parts], tmp_path: Path) -> None:
    parts = make(tmp_path / "run")
    parts.callbacks.append(At(5, crash))
    with pytest.raises(Crash):
        run(parts)
    other = make(tmp_path / "run", resume=True, family="gpt2")
    with pytest.raises(
        ValueError, match=r"the weights do not fit the student that the record describes: .* is (missing|unknown)"
    ):
        run(other)
    wide = make(tmp_path / "run", resume=True)
    wide = replace(wide, teacher=replace(wide.teacher, model=tiny("llama", vocab=257, hidden=96, heads=6)))
    with pytest.raises(ValueError, match=r"has shape \[257, 48\] instead of \[257, 96\]"):
        run(wide)


def test_a_corrupted_token_shard_is_refused(make: Callable[..., Parts], text: Path, tmp_path: Path) -> None:
    run(make(tmp_path / "run", cache=tmp_path / "cache"))
    shard = next((tmp_path / "cache").rglob("train.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train.bin does not have the SHA-256 that was written; delete the folder"):
        run(make(tmp_path / "again", cache=tmp_path / "cache"))


def test_strategies_that_would_lose_an_edit_are_refused() -> None:
    for kind in ("spawn", "fork"):
        with pytest.raises(ValueError, match="lose the edited student"):
            check_strategy(DDPStrategy(start_method=kind))
    with pytest.raises(ValueError, match="hides blocks that are not synchronised"):
        check_strategy(DDPStrategy(find_unused_parameters=True))
    check_strategy(DDPStrategy())


@pytest.mark.parametrize("kind", [DDPStrategy, FSDP2Strategy])
def test_far_more_processes_than_cores_are_refused_before_one_is_started(
    kind: type[DDPStrategy] | type[FSDP2Strategy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iskd.training.strategies.usable_cores", lambda: 4)

    def strategy(
        number: int, device: str = "cpu", environment: Any = LightningEnvironment
    ) -> DDPStrategy | FSDP2Strategy:
        made = kind()
        made.parallel_devices, made.cluster_environment = [torch.device(device)] * number, environment()
        return made

    for fine in (strategy(1), strategy(16), strategy(17, "cuda"), strategy(17, environment=TorchElasticEnvironment)):
        check_processes(fine)
    with pytest.raises(ValueError, match=r"trainer\.devices=17 would start 17 processes, .* takes at most 16"):
        check_processes(strategy(17))
    assert [starts_processes(strategy(number)) for number in (1, 2)] == [False, True]
    assert not starts_processes(strategy(2, environment=TorchElasticEnvironment))


def test_an_untested_torch_edits_shards_in_fresh_processes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iskd.models.sharding.UNTESTED", "they were tested with torch 2.13, this is 9.9")
    with pytest.raises(ValueError, match=r"this is 9\.9; use schedule.restart_at_edit=true"):
        check_strategy(FSDP2Strategy())
    check_strategy(FSDP2Strategy(), edits=False)


def test_sharded_checkpoints_need_shards(make: Callable[..., Parts], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.checkpoints=sharded saves the shards of trainer=fsdp"):
        run(make(tmp_path / "run", options={"checkpoints": "sharded"}))
    with pytest.raises(ValueError, match=r"run.on_oom='pray': choose stop or halve"):
        RunOptions(on_oom="pray")


def layout(batch_size: int, accumulate: int, processes: int) -> dict[str, Any]:
    return {"batch_size": batch_size, "accumulate": accumulate, "processes": processes, "seq_len": 32, "seed": 0}


def test_positions_are_expressed_in_another_layout() -> None:
    """Windows seen stay seen; inside a stage only what changes no number is allowed."""
    record = surgery.Record(4)
    state = RunState(
        record, first_batch=24, batch=6, first_step=12, total_steps=24, edited=True, identity=layout(2, 2, 1)
    )
    state.take_up(layout(1, 4, 1))
    assert (state.first_batch, state.batch, state.first_step, state.total_steps) == (48, 12, 12, 24)
    with pytest.raises(ValueError, match="now there are 2: each has its own windows"):
        state.take_up(layout(1, 2, 2))
    with pytest.raises(ValueError, match=r"keep data\.batch_size x trainer.accumulate_grad_batches"):
        state.take_up(layout(1, 2, 1))
    state.batch, state.edited = 0, False
    state.take_up(layout(3, 2, 4))
    assert (state.first_batch, state.first_step, state.total_steps) == (4, 2, 4), "no window is seen twice"
    with pytest.raises(ValueError, match="made with seed=0, now it is 1"):
        state.take_up({**layout(3, 2, 4), "seed": 1})
    assert json.loads(json.dumps(state.to_json()))["events"]
