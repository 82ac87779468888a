"""Objects -> result: one run from the teacher to the report. For `iskd train`, `iskd.compress` and hand-made parts."""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import wandb
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from iskd.export import load
from iskd.export.loading import record_of
from iskd.models import surgery, weights
from iskd.plan import Record, Stage
from iskd.plan.failure import told_in
from iskd.plan.run_files import FAILURE_FILE, LOCK_FILE
from iskd.plan.trainer_settings import MAX_TIME, seconds, trainer_settings, with_defaults
from iskd.report.terminal import terminal
from iskd.schedules.mixed import Mixed, parts_of
from iskd.system import Preempted, global_rank, run_lock
from iskd.system.patches import without_signal_handlers, without_sigterm_broadcast
from iskd.system.precision import precision
from iskd.training.attempts import as_halved, with_smaller_batches
from iskd.training.callback import CompressionCallback
from iskd.training.editing import Editor, adapt
from iskd.training.facts import write_facts
from iskd.training.finish import along_the_run, finish
from iskd.training.metrics import MetricsFile, keep_metrics, log_start
from iskd.training.metrics.along import AlongTheRun
from iskd.training.metrics.costs import a_few
from iskd.training.parts import Parts, Result
from iskd.training.progress_bar import StageProgress
from iskd.training.restart import EditInFreshProcess, StartAgain
from iskd.training.stages import StageLoop
from iskd.training.state import RunState, StudentKeeper, stored_in
from iskd.training.state.resuming import config_digest, last_position
from iskd.training.step import DistillModule, adapters
from iskd.training.strategies import (
    FSDP2Strategy,
    check_processes,
    check_strategy,
    meet_first,
    starts_processes,
    strategy_of,
)

TRAINER_KEYS = frozenset(inspect.signature(L.Trainer).parameters)
# what Lightning says about every run of ours, and why it does not matter here
_EXPECTED = (
    "Experiment logs directory .* exists",  # the run directory is ours, and rows of earlier sessions are kept aside
    ".*LeafSpec.* is deprecated",  # inside Lightning
    ".*does not have many workers",  # batches are slices of a memory map
    "The number of training batches .* is smaller than the logging interval",
    "You defined a `validation_step`",
    "The .grad attribute of a Tensor that is not a leaf",  # torch's compiler looks at it
)


def run(parts: Parts) -> Result:
    """Run the schedule to its end and write model, tables and report into the run directory.

    Raises:
        Preempted: a signal, or trainer.max_time, asked the run to stop; everything is saved.
        StartAgain: the next edit wants a fresh process.
        UnfinishedError: something else than the schedule ended the training.
        ValueError: another process runs in the directory.
        NonFiniteError, OSError, ValueError: with what happened, the last good checkpoint and what helps.
    """
    began = time.monotonic()
    lock, done = parts.run_dir / LOCK_FILE, True
    run_lock.hold(lock)
    if global_rank() == 0:
        (parts.run_dir / FAILURE_FILE).unlink(missing_ok=True)
    try:
        with told_in(parts.run_dir), warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message=message)
            limit = seconds(parts.trainer[MAX_TIME])
            return with_smaller_batches(parts, partial(_run, deadline=None if limit is None else began + limit))
    except StartAgain:
        done = False  # the process in the place of this one goes on with the lock
        raise
    finally:
        if done:
            run_lock.release(lock)
        if any(isinstance(logger, WandbLogger) for logger in parts.loggers):
            wandb.finish()  # otherwise the next job of a sweep would continue this one


def _run(parts: Parts, deadline: float | None = None) -> Result:
    _settings(parts)  # refused before text is read
    L.seed_everything(parts.seed, verbose=False)
    parts.data.prepare()
    state, resume_from = _position(parts)
    parts = as_halved(parts, state)
    module = make_module(parts, state)
    callback = CompressionCallback(_loop(parts, state), resume_from, deadline)
    loggers = _loggers(parts, None if resume_from is None else state.tokens)
    trainer = _trainer(parts, callback, loggers)
    _check(parts, trainer, callback.loop)
    if trainer.is_global_zero:
        write_facts(parts, trainer)
    if parts.options.plan_only and starts_processes(trainer.strategy):
        callback.planned = trainer.world_size
        trainer = _trainer(_alone(parts), callback, loggers)
    try:
        callback.stop_signals.install()
        try:
            trainer.fit(module, datamodule=parts.data)
        except Preempted:
            raise
        except SystemExit as error:
            if error.code in (None, 0) and state.stage is not None:  # else it would look like the end of the schedule
                raise callback.loop.unfinished() from error
            raise
        finally:
            module.teardown("fit")  # Lightning calls it only where nothing was raised, and models may be the caller's
            for logger in trainer.loggers:
                logger.finalize("success" if state.stage is None else "aborted")
        _leave(parts, trainer, callback)
        result = finish(parts, trainer, module, state, callback.stop_signals, callback.loop.along)
    except BaseException:
        callback.close(failed=True)
        raise
    callback.close()
    return result


def _loop(parts: Parts, state: RunState) -> StageLoop:
    digest = parts.teacher.source.get("sha256")
    teacher = None if digest is None else str(digest)
    steps = parts.schedule.parts if isinstance(parts.schedule, Mixed) else ()
    kind = EditInFreshProcess if parts.schedule.restart_at_edit else Editor
    by_step, cache = [step.refits for step in steps], parts.data.cache_dir.parent
    where = cache / "streams", parts.options.fit_streams
    editor = kind(parts.refits, parts.data.calibration, by_step, *where, parts.data.seq_len, parts.options.fit_tokens)
    spec, keeps = parts.evaluation, parts.options.keep_students
    along: AlongTheRun | None = None
    few: list[tuple[AlongTheRun, float]] = []
    if spec is not None and spec.along and not parts.options.plan_only:
        along = along_the_run(parts, spec)
    elif spec is not None and spec.asks:
        few = [(along_the_run(parts, asked), times) for asked, times in a_few(spec)]
    number = None if keeps is True else int(keeps)
    keep = StudentKeeper(
        parts.run_dir, parts.teacher, number, stored_in(parts.export_dtype, parts.teacher),
        parts.export_code, parts.options.max_shard_bytes,
    )  # fmt: skip
    return StageLoop(
        parts.schedule, parts.importance, parts.data, parts.run_dir, state, parts.options,
        teacher, config_digest(parts.run_dir), editor, parts.tokens_told, along, spec, keep if keeps else None,
        exports=parts.export, few=few,
    )  # fmt: skip


def _check(parts: Parts, trainer: L.Trainer, loop: StageLoop) -> None:
    """Raise ValueError for a strategy that cannot do what the run asks of it."""
    stage = loop.state.stage
    trained = [getattr(each.schedule, "train", None) for each in parts_of(parts.schedule)]
    adapters = "lora" in (*trained, stage and stage.train)
    check_processes(trainer.strategy)
    check_strategy(trainer.strategy, edits=loop.editor.in_place, adapters=adapters)
    loop.editor.check(timed=parts.trainer[MAX_TIME] is not None)
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in parts.callbacks):
        raise ValueError("GradientAccumulationScheduler: a run has one size of a step, trainer.accumulate_grad_batches")
    if parts.options.checkpoints == "sharded" and not isinstance(trainer.strategy, FSDP2Strategy):
        raise ValueError("run.checkpoints=sharded saves the shards of trainer=fsdp; use run.checkpoints=full here")


def _leave(parts: Parts, trainer: L.Trainer, callback: CompressionCallback) -> None:
    """End the process where the run stopped before its end; everything is saved and every file is closed."""
    loop = callback.loop
    if (loop.state.stage is None and not loop.preempted) or parts.options.plan_only:
        return
    if not loop.leaving:
        raise loop.unfinished()
    trainer.strategy.barrier("leave")  # rank 0 may not come back from handing the signal on
    callback.watchdog.close()
    if not loop.preempted:
        loop.editor.leave(parts.run_dir)
    stop_signals = callback.stop_signals
    stop_signals.hand_on()
    by_time = callback.late and stop_signals.received is None
    raise Preempted(parts.run_dir, "trainer.max_time" if by_time else None, stop_signals.received)


def _position(parts: Parts) -> tuple[RunState, Path | None]:
    """A fresh position, or that of the newest whole checkpoint."""
    layers = int(parts.teacher.model.config.num_hidden_layers)
    found = last_position(parts.run_dir, layers) if parts.resume else None
    state, newest = (begun(parts), None) if found is None else found
    if parts.resume and found is None:
        terminal().print("no whole checkpoint yet: the run starts from its beginning")
    # before the trainer exists, a launcher's variables tell the rank
    if global_rank() == 0:  # of a run that starts too: an earlier start may have come to nothing
        keep_metrics(parts.run_dir, below=None if found is None else state.tokens, results=len(state.results))
    return state, newest


def begun(parts: Parts) -> RunState:
    """A fresh position: of the teacher as it is, or of the student that the run goes on from."""
    layers = int(parts.teacher.model.config.num_hidden_layers)
    return RunState(record=Record(layers) if parts.start is None else record_of(parts.start, layers))


def make_module(parts: Parts, state: RunState) -> DistillModule:
    """Teacher and student of the run where it stands; weights of a resumed student come with its checkpoint."""
    teacher = parts.teacher.model
    student = surgery.rebuild(teacher, state.record) if state.record.edits else copy.deepcopy(teacher).float()
    if parts.start is not None and not state.identity:  # later its weights come with a checkpoint
        weights.load_model_tensors(student, weights.model_tensors(load(parts.start)))
    if state.stage is not None and state.edited:
        stage = state.stage
        adapt(student, state.record, stage)
    else:
        stage = adapters.merged(state.finished[-1]) if state.finished else Stage("start")
    return DistillModule(
        student, teacher, parts.terms, parts.optim, state.record,
        stage=stage, chunk=parts.chunk, share_prefix=parts.options.share_prefix, teacher_cache=parts.teacher_cache,
        gradient_checkpointing=parts.options.gradient_checkpointing, compile=parts.options.compile,
        separator=parts.data.separator,
    )  # fmt: skip


def _settings(parts: Parts) -> dict[str, Any]:
    """What the trainer is made with. Raises ValueError for what a run cannot take, see `trainer_settings`."""
    settings = trainer_settings(parts.trainer, TRAINER_KEYS)
    return {**settings, "precision": precision(settings["precision"], str(settings["accelerator"]))}


def _alone(parts: Parts) -> Parts:
    """The same for one process, on the first of the devices."""
    devices = parts.trainer.get("devices")
    one = devices[:1] if isinstance(devices, list) else 1
    return replace(parts, trainer={**parts.trainer, "devices": one, "num_nodes": 1, "strategy": "auto"})


def _trainer(parts: Parts, callback: CompressionCallback, loggers: Sequence[Logger]) -> L.Trainer:
    callbacks: list[Callback] = [callback, *parts.callbacks]
    settings = strategy_of(_settings(parts))
    if settings.pop("progress"):
        callbacks.append(StageProgress(callback.loop))
    try:
        trainer = L.Trainer(
            **{
                "max_epochs": -1,
                "reload_dataloaders_every_n_epochs": 1,
                "use_distributed_sampler": False,
                "limit_val_batches": 0,
                "num_sanity_val_steps": 0,
                "enable_checkpointing": False,
                "enable_progress_bar": any(isinstance(c, StageProgress) for c in callbacks),
                "default_root_dir": str(parts.run_dir),
                **settings,
            },
            callbacks=callbacks,
            logger=list(loggers),
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        default, given = with_defaults({}), {key: parts.trainer[key] for key in settings if key in parts.trainer}
        keys = [f"trainer.{key}={value!s:.80}" for key, value in given.items() if value != default.get(key)]
        said = " ".join(str(error).split())
        raise ValueError(f"{', '.join(keys) or 'trainer'}: Lightning refuses that here: {said:.400}") from error
    without_sigterm_broadcast(trainer)
    without_signal_handlers(trainer)
    meet_first(trainer)
    return trainer


def _loggers(parts: Parts, resumed_at: int | None) -> list[Logger]:
    """metrics.csv in the run directory, always, and whatever was chosen beside it."""
    log_start(parts.loggers, parts.run_dir, resumed_at)
    return [MetricsFile(parts.run_dir), *parts.loggers]
