"""Objects -> result: one run from the teacher to the report. Called by `build`, and by tests with hand-made parts."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from rich.console import Console
from torch import distributed as dist

from iskd.models import surgery
from iskd.plan import Record, Stage
from iskd.plan.run_folder import CHECKPOINTS
from iskd.system import Preempted, global_rank
from iskd.system.faults import is_out_of_memory
from iskd.training.callback import CompressionCallback
from iskd.training.editing import adapt
from iskd.training.facts import write_facts
from iskd.training.finish import finish
from iskd.training.loggers import log_start
from iskd.training.metrics_file import keep_metrics, merge_metrics
from iskd.training.parts import Parts, Result
from iskd.training.progress_bar import StageProgress
from iskd.training.state import RunState, checkpoint, checkpoint_files
from iskd.training.step import DistillModule, adapters
from iskd.training.strategies import FSDP2Strategy, check_strategy, strategy_of

# what Lightning says about every run of ours, and why it does not matter here
_EXPECTED = (
    "Experiment logs directory .* exists",  # the run directory is ours, and rows of earlier sessions are kept aside
    ".*LeafSpec.* is deprecated",  # inside Lightning
    ".*does not have many workers",  # batches are slices of a memory map
    "The number of training batches .* is smaller than the logging interval",
    "You defined a `validation_step`",
    "The .grad attribute of a Tensor that is not a leaf",  # torch's compiler looks at it
)


class StartAgain(SystemExit):
    """The run is saved right before an edit and goes on in a fresh process (`schedule.restart_at_edit`).

    Ends the process with code 75, "try again"; processes other than rank 0 end with 0, because Lightning kills rank 0
    as soon as another one fails.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(75 if global_rank() == 0 else 0)
        self.run_dir = run_dir
        self.message = f"saved before an edit: start again with resume={run_dir}"


def run(parts: Parts) -> Result:
    """Run the schedule to its end and write model, tables and report into the run directory.

    Raises:
        Preempted: a signal asked the run to stop; everything is saved.
        StartAgain: the next edit wants a fresh process.
        NonFiniteError, OSError, ValueError: with what happened, the last good checkpoint and what helps.
    """
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message=message)
            return _attempts(parts)
    finally:
        if any(isinstance(logger, WandbLogger) for logger in parts.loggers):
            wandb.finish()  # otherwise the next job of a sweep would continue this one


def _attempts(parts: Parts) -> Result:
    """The run, with smaller and smaller micro-batches where `run.on_oom=halve`."""
    while True:
        try:
            return _run(parts)
        except (RuntimeError, MemoryError) as error:
            smaller = halved(parts) if is_out_of_memory(error) else None
            if smaller is None:
                raise
            Console().print(f"{error}\nrun.on_oom=halve: going on with data.batch_size={smaller.data.batch_size}")
        # the frames of the failed attempt are gone with its exception, and with them its tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        parts = smaller


def halved(parts: Parts) -> Parts | None:
    """The same run with half the micro-batch and twice the accumulation, going on from its newest checkpoint.

    None when that was not asked for, when a micro-batch has an odd number of windows, or on several processes, which
    are broken off inside a collective and have to be started again.
    """
    size, several = parts.data.batch_size, dist.is_available() and dist.is_initialized()
    if parts.options.on_oom != "halve" or size < 2 or size % 2 or several:
        return None
    parts.data.trainer = None  # it holds the failed attempt and its tensors
    data = copy.copy(parts.data)
    data.batch_size = size // 2
    accumulate = 2 * int(parts.trainer.get("accumulate_grad_batches", 1))
    return replace(parts, data=data, trainer={**parts.trainer, "accumulate_grad_batches": accumulate}, resume=True)


def _run(parts: Parts) -> Result:
    L.seed_everything(parts.seed, verbose=False)
    parts.data.prepare()
    state, resume_from = _position(parts)
    parts = _as_halved(parts, state)
    module = make_module(parts, state)
    digest = parts.teacher.source.get("sha256")
    callback = CompressionCallback(
        parts.schedule,
        parts.importance,
        parts.data,
        parts.run_dir,
        state,
        parts.options,
        resume_from,
        teacher=None if digest is None else str(digest),
    )
    trainer = _trainer(parts, callback)
    adapters = "lora" in (getattr(parts.schedule, "train", None), state.stage and state.stage.train)
    check_strategy(trainer.strategy, edits=not parts.schedule.restart_at_edit, adapters=adapters)
    if parts.options.checkpoints == "sharded" and not isinstance(trainer.strategy, FSDP2Strategy):
        raise ValueError("run.checkpoints=sharded saves the shards of trainer=fsdp; use run.checkpoints=full here")
    if trainer.is_global_zero:
        write_facts(parts, trainer)
    try:
        try:
            trainer.fit(module, datamodule=parts.data)
        finally:
            for logger in trainer.loggers:
                logger.finalize("success" if state.stage is None else "aborted")
            if trainer.is_global_zero:
                merge_metrics(parts.run_dir)
        _leave(parts, trainer, callback)
        result = finish(parts, trainer, module, state)
    except BaseException:
        callback.close(failed=True)
        raise
    callback.close()
    return result


def _leave(parts: Parts, trainer: L.Trainer, callback: CompressionCallback) -> None:
    """End the process where the run stopped before its end; everything is saved and every file is closed."""
    if callback.state.stage is None or not callback.leaving:
        return
    trainer.strategy.barrier("leave")  # rank 0 may not come back from handing the signal on
    callback.watchdog.close()
    if callback.restarting and not callback.preempted:
        raise StartAgain(parts.run_dir)
    callback.signals.hand_on()
    raise Preempted(parts.run_dir)


def _as_halved(parts: Parts, state: RunState) -> Parts:
    """The micro-batch that `run.on_oom=halve` came to before, instead of the configured one that was too large."""
    size, accumulate = (state.identity.get(key, 0) for key in ("batch_size", "accumulate"))
    now = int(parts.trainer.get("accumulate_grad_batches", 1))
    same_step = size * accumulate == parts.data.batch_size * now
    if parts.options.on_oom != "halve" or not same_step or size >= parts.data.batch_size:
        return parts
    data = copy.copy(parts.data)
    data.batch_size = size
    return replace(parts, data=data, trainer={**parts.trainer, "accumulate_grad_batches": accumulate})


def _position(parts: Parts) -> tuple[RunState, Path | None]:
    """A fresh position, or that of the newest whole checkpoint."""
    fresh = RunState(record=Record(int(parts.teacher.model.config.num_hidden_layers)))
    if not parts.resume:
        return fresh, None
    newest = checkpoint_files.newest(parts.run_dir / CHECKPOINTS)
    if newest is None:
        Console().print("no whole checkpoint yet: the run starts from its beginning")
        _on_rank_zero(keep_metrics, parts.run_dir, below=None)
        return fresh, None
    state = checkpoint.read_state(newest)
    if state.record.num_layers != fresh.record.num_layers:
        raise ValueError(
            f"the run was made from a teacher with {state.record.num_layers} layers, "
            f"model= gives one with {fresh.record.num_layers}"
        )
    _on_rank_zero(keep_metrics, parts.run_dir, below=state.tokens)
    return state, newest


def _on_rank_zero(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Call once per run; before the trainer exists, a launcher's variables tell the rank."""
    if global_rank() == 0:
        function(*args, **kwargs)


def make_module(parts: Parts, state: RunState) -> DistillModule:
    """Teacher and student of the run where it stands; weights of a resumed student come with its checkpoint."""
    teacher = parts.teacher.model
    student = surgery.rebuild(teacher, state.record) if state.record.edits else copy.deepcopy(teacher).float()
    module = DistillModule(
        student, teacher, parts.terms, parts.optim, state.record,
        chunk=parts.chunk, share_prefix=parts.options.share_prefix, separator=parts.data.separator,
        gradient_checkpointing=parts.options.gradient_checkpointing, compile=parts.options.compile,
    )  # fmt: skip
    module.cache_spec = parts.cache
    if state.stage is not None and state.edited:
        module.stage = state.stage
        adapt(student, state.record, state.stage)
    elif state.finished:
        module.stage = adapters.merged(state.finished[-1])
    else:
        module.stage = Stage("start")
    return module


def _trainer(parts: Parts, callback: CompressionCallback) -> L.Trainer:
    callbacks: list[Callback] = [callback, *parts.callbacks]
    settings = strategy_of(dict(parts.trainer))
    if settings.pop("progress", True):
        callbacks.append(StageProgress(callback))
    trainer = L.Trainer(
        **{
            "max_epochs": -1,
            "reload_dataloaders_every_n_epochs": 1,
            "use_distributed_sampler": False,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": any(isinstance(c, StageProgress) for c in callbacks),
            "log_every_n_steps": 1,
            "default_root_dir": str(parts.run_dir),
            **settings,
        },
        callbacks=callbacks,
        logger=_loggers(parts),
    )
    # before every micro-batch Lightning asks rank 0 for a SIGTERM of its own, and waits for the device; the ranks agree
    # on ours in `iskd.training.step.guard`
    vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None
    return trainer


def _loggers(parts: Parts) -> list[Logger]:
    """metrics.csv in the run directory, always, and whatever was chosen beside it."""
    log_start(parts.loggers, parts.run_dir)
    return [CSVLogger(str(parts.run_dir), name="", version="", flush_logs_every_n_steps=20), *parts.loggers]
