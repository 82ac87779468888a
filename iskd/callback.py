"""The only place where a running model changes: one Lightning epoch is one stage.

At the start of a stage, on every rank alike and in this order: decide (rank 0, broadcast), edit, optimizer, strategy,
log. At its end: measure, check the quality floor, decide the next stage, write a checkpoint. A resumed run enters
with its state restored and a data position in the middle of a stage; nothing here depends on Lightning's own loop
counters.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd import checkpoint, surgery
from iskd.arch import Stack
from iskd.data import TextData
from iskd.distributed import check_strategy, from_all_ranks, from_rank_zero, rewrap
from iskd.fit import warm_start
from iskd.module import DistillModule, NonFiniteError
from iskd.movement import MovementCheck
from iskd.optim import check_partition, new_parameters, regroup
from iskd.options import RunOptions
from iskd.plan import Record, Stage, stage_from_json, to_json
from iskd.planning import forecast, plan_rows, planned_steps, print_plan, probe, stage_steps
from iskd.schedules.base import History, Schedule
from iskd.state import RunState, Status
from iskd.tracking import QUALITY, log_row, write_stages

Importance = Callable[[PreTrainedModel, PreTrainedModel, Sequence[Tensor]], Tensor]
_log = logging.getLogger(__name__)


class CompressionCallback(Callback):
    """Runs the schedule inside one `trainer.fit`.

    Args:
        schedule: decides the stages. importance: scores layers when the schedule asks for it.
        data: the run's data module. run_dir: where checkpoints and `stages.json` go.
        state: where the run stands; a fresh one at the start. options: see `RunOptions`.
        resume_from: checkpoint whose optimizer state and random numbers are loaded when training starts.
        teacher: digest of the teacher's weights; a resumed run must find the same.
    """

    def __init__(
        self,
        schedule: Schedule,
        importance: Importance | None,
        data: TextData,
        run_dir: Path,
        state: RunState,
        options: RunOptions,
        resume_from: Path | None = None,
        teacher: str | None = None,
    ) -> None:
        if schedule.scoring != "never" and importance is None:
            raise ValueError(
                "schedule.order=importance needs scores; choose importance=block_influence|bi_veto|ablation|random"
            )
        self.schedule, self.importance, self.data, self.run_dir = schedule, importance, data, run_dir
        self.state, self.options, self.resume_from, self.teacher = state, options, resume_from, teacher
        self._movement = MovementCheck()
        self._steps = 0  # optimizer steps in this stage
        self._clock = time.perf_counter()
        self._training_since = (self._clock, 0)
        self._train_speed: float | None = None
        self._boundary: Path | None = None

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the whole run so far."""
        return self.state.steps + self._steps

    # ---- start ------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the teacher and decide the first stage, or take up a resumed run."""
        module = cast(DistillModule, pl_module)
        check_strategy(trainer.strategy)
        module.place_teacher()
        state = self.state
        if self.resume_from is not None:
            state.check_identity(self._identity(trainer))
            optimizer = trainer.optimizers[0]
            regroup(optimizer, module.student, state.record, module.stage)
            checkpoint.restore(self.resume_from, module.student, optimizer, trainer.global_rank)
            rewrap(trainer.strategy)  # what trains may differ from what the strategy wrapped at start-up
            if self.schedule.floor is not None:
                self._boundary = checkpoint.newest(self.run_dir / "checkpoints", checkpoint.BOUNDARY)
            self._begin(trainer, module)
            return
        state.identity = self._identity(trainer)
        state.results.append(state.row(module.student, "teacher", self._measure(trainer, module), None, "kept"))
        log_row(trainer.loggers, self.state.results[-1], self.state.steps)
        self._decide(trainer, module)
        plan = forecast(self.schedule, History(state.record, (), state.scores))
        steps = planned_steps(plan, self._step_tokens(trainer))
        state.total_steps, state.total_stages = max(1, sum(steps)), len(plan)
        self._print_plan(trainer, module, plan, steps)
        if self.options.plan_only:
            trainer.should_stop = True
            self.data.set_stage(0, 1)
            return
        self._save(trainer, module)
        self._begin(trainer, module)

    def _print_plan(
        self, trainer: L.Trainer, module: DistillModule, plan: Sequence[Stage], steps: Sequence[int]
    ) -> None:
        """Stages, exact parameter counts, tokens and the time that a short probe predicts, before the first step."""
        with trainer.precision_plugin.forward_context():
            seconds = probe(module, self.data.calibration(self._step_tokens(trainer))[0].to(module.device))
        tokens = [count * self._step_tokens(trainer) for count in steps]
        rows = plan_rows(module.teacher, plan, tokens, seconds / trainer.world_size)
        if any(stage.edits for stage in plan) and rows[-1]["block_params"] >= rows[0]["block_params"]:
            raise ValueError(
                f"the edits remove nothing: {rows[0]['block_params']:,} block parameters before them and "
                f"{rows[-1]['block_params']:,} after; choose a smaller block (block.ratio), or schedule=none"
            )
        if trainer.is_global_zero:
            (self.run_dir / "plan.json").write_text(json.dumps(rows, indent=1))
            print_plan(rows)

    def _begin(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Carry out stages without training, and point the data at what is left of the one with training."""
        state = self.state
        while state.stage is not None and not self._stage_steps(trainer, state.stage):
            if not state.edited:
                self._edit(trainer, module)
            self._end(trainer, module)
        if state.stage is None:
            trainer.should_stop = True
            self.data.set_stage(state.first_batch, 1)  # Lightning asks for a loader even when there is nothing to train
            return
        steps = self._stage_steps(trainer, state.stage) * trainer.accumulate_grad_batches
        self._steps = state.batch // trainer.accumulate_grad_batches
        module.tokens, module.stage, module.stage_number = state.tokens, state.stage, len(state.finished) + 1
        self.data.set_stage(state.first_batch + state.batch, steps - state.batch)

    def _decide(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Next stage: rank 0 scores and decides, everybody gets the same JSON."""
        state = self.state
        stale = self.schedule.scoring == "each" or state.scores is None
        if self.schedule.scoring != "never" and stale:
            state.scores = from_rank_zero(trainer, self._score(trainer, module))
        history = History(state.record, state.finished, state.scores)
        stage = self.schedule.next_stage(history)
        decided = from_rank_zero(trainer, None if stage is None else to_json(stage))
        state.stage = None if decided is None else stage_from_json(decided)
        state.edited, state.batch, state.before, state.seconds, state.events = False, 0, None, 0.0, []

    def _score(self, trainer: L.Trainer, module: DistillModule) -> dict[int, float]:
        assert self.importance is not None
        batches = [batch.to(module.device) for batch in self.data.calibration(self.options.score_tokens)]
        with trainer.precision_plugin.forward_context():
            scores = self.importance(module.student, module.teacher, batches)
        if not scores.isfinite().all():
            raise ValueError(f"importance gave a score that is not finite: {scores.tolist()}")
        return dict(zip(self.state.record.layers, scores.tolist(), strict=True))

    # ---- edit -------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply the stage's edits, unless a resumed run is already past them."""
        module = cast(DistillModule, pl_module)
        self._clock = time.perf_counter()
        if not self.state.edited:
            self._edit(trainer, module)
        self._training_since = (time.perf_counter(), self.state.tokens)

    def _edit(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Edit, optimizer, strategy, log; the decision was made at the end of the stage before."""
        state, stage = self.state, self.state.stage
        assert stage is not None
        old = dict(zip(state.record.layers, Stack(module.student).layers, strict=True))
        record = surgery.apply(module.student, state.record, stage.edits)
        if stage.fit and self.options.fit_tokens and stage.edits:
            self._fit(trainer, module, old, record, stage)
        state.record = module.record = record
        module.stage, module.stage_number = stage, len(state.finished) + 1
        optimizer = trainer.optimizers[0]
        regroup(optimizer, module.student, record, stage)
        rewrap(trainer.strategy)
        check_partition(optimizer, module.student)
        self._movement.watch(module.student, new_parameters(module.student, record, stage))
        self._steps, self._train_speed = 0, None
        if self.options.measure_before and stage.edits:
            quality = self._measure(trainer, module)
            state.before = {key: quality[key] for key in QUALITY}
        state.edited = True
        _log.info("stage %d: %s, %d parameters", module.stage_number, stage.name, surgery.parameters(module.student))

    def _fit(
        self, trainer: L.Trainer, module: DistillModule, old: dict[int, nn.Module], record: Record, stage: Stage
    ) -> None:
        batches = self.data.calibration(self.options.fit_tokens)
        with trainer.precision_plugin.forward_context():
            fitted = warm_start(module.student, module.teacher, old, record, stage.edits, batches)
        for entry in fitted:
            self.state.events.append(
                f"block {entry.layer} fitted: relative squared error {entry.before:.4f} -> {entry.after:.4f}"
            )

    # ---- train ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the factor on the learning rates for the coming step."""
        module, stage = cast(DistillModule, pl_module), self.state.stage
        assert stage is not None
        module.steps = self.state.steps + self._steps
        module.lr_scale = module.optim.scale(
            self._steps, self._stage_steps(trainer, stage), self.state.steps, self.state.total_steps
        )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Every new parameter must have a gradient: one without is not part of the graph or of the synchronisation."""
        self._movement.check_gradients()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Count; at optimizer steps check that new parameters move and write a checkpoint now and then."""
        module, state = cast(DistillModule, pl_module), self.state
        assert state.stage is not None
        state.batch += 1
        state.tokens += batch["input_ids"].numel() * trainer.world_size
        module.tokens = state.tokens
        if state.batch % trainer.accumulate_grad_batches:
            return
        self._steps += 1
        last = self._steps == self._stage_steps(trainer, state.stage)
        if self._movement.active and (last or self._steps >= self.options.movement_steps):
            # behind a zero up-projection the first gradient is exactly zero: one step alone proves nothing
            self._movement.finish(rate=module.lr_scale * module.stage.lr_new if self._steps > 1 else 0.0)
        if not last and self._steps % self.options.checkpoint_every == 0:
            self._tick()
            self._save(trainer, module)

    # ---- end --------------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, keep or roll back, decide what comes next."""
        module = cast(DistillModule, pl_module)
        self._tick()
        now = time.perf_counter()
        since, tokens = self._training_since
        self._train_speed = (self.state.tokens - tokens) / max(now - since, 1e-9)
        self._end(trainer, module)
        self._begin(trainer, module)

    def _end(self, trainer: L.Trainer, module: DistillModule) -> None:
        state, stage = self.state, self.state.stage
        assert stage is not None
        quality = self._measure(trainer, module)
        floor = self.schedule.floor
        missed = floor is not None and bool(stage.edits) and quality["retention"] < floor
        if missed:
            state.events.append(
                f"retention {quality['retention']:.4f} is below schedule.floor={floor}: stage rolled back, "
                "the run ends with the student before it"
            )
        status: Status = "rolled_back" if missed else "kept"
        row = state.row(module.student, stage.name, quality, self._train_speed, status)
        state.results.append(row)
        if missed:
            self._roll_back(trainer, module)
            return
        steps = self._stage_steps(trainer, stage)
        state.finished = (*state.finished, stage)
        state.first_batch += steps * trainer.accumulate_grad_batches
        state.steps += steps
        log_row(trainer.loggers, self.state.results[-1], self.state.steps)
        self._decide(trainer, module)
        self._save(trainer, module)

    def _roll_back(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Put student, record and optimizer back to the last stage boundary, and end the run."""
        assert self._boundary is not None, "a floor always keeps the last boundary"
        state, before = self.state, checkpoint.read_state(self._boundary)
        optimizer = trainer.optimizers[0]
        device = module.device
        module.student = surgery.rebuild(module.teacher, before.record).train()
        nn.Module.to(module.student, device)
        state.record = module.record = before.record
        module.stage = state.finished[-1] if state.finished else Stage("start")
        regroup(optimizer, module.student, before.record, module.stage)
        checkpoint.restore(self._boundary, module.student, optimizer, rng=False)
        rewrap(trainer.strategy)
        state.stage, state.edited, state.batch = None, False, 0
        log_row(trainer.loggers, self.state.results[-1], self.state.steps)
        self._save(trainer, module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say where the last good state is when numbers blow up."""
        if isinstance(exception, NonFiniteError):
            good = checkpoint.newest(self.run_dir / "checkpoints")
            exception.args = (
                f"{exception.args[0]}. Last good checkpoint: {good}. Start a new run with a lower schedule.lr and "
                "schedule.lr_new, or with trainer.precision=32-true",
            )

    def _tick(self) -> None:
        """Add the time since the last call to the stage's."""
        now = time.perf_counter()
        self.state.seconds += now - self._clock
        self._clock = now

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _step_tokens(self, trainer: L.Trainer) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.data.batch_size * self.data.seq_len * trainer.accumulate_grad_batches * trainer.world_size

    def _identity(self, trainer: L.Trainer) -> dict[str, Any]:
        return {**self.data.identity(), "processes": trainer.world_size, "teacher": self.teacher}

    def _stage_steps(self, trainer: L.Trainer, stage: Stage) -> int:
        return stage_steps(stage, self.state.finished, self.state.steps, self._step_tokens(trainer))

    def _measure(self, trainer: L.Trainer, module: DistillModule) -> dict[str, float]:
        batches = self.data.validation()
        with trainer.precision_plugin.forward_context():
            quality = module.measure(batches)
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        return {**quality, "tokens_per_s": tokens / max(quality["seconds"], 1e-9)}

    def _save(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Write a checkpoint (rank 0) with every rank's random numbers, and drop the ones that are no longer needed."""
        rng = from_all_ranks(trainer, checkpoint.rng_tensors())
        root = self.run_dir / "checkpoints"
        if trainer.is_global_zero:
            path = checkpoint.save(root, module.student, trainer.optimizers[0], self.state, rng)
            if not self.state.edited:
                self._boundary = path
            pinned = [self._boundary] if self._boundary is not None and self.schedule.floor is not None else []
            checkpoint.prune(root, keep=self.options.keep, pinned=pinned)
            write_stages(self.run_dir, self.state.results)
            for logger in trainer.loggers:
                logger.save()  # rows up to here must outlive a kill: the resumed run continues after them
        self._boundary = from_rank_zero(trainer, self._boundary)
