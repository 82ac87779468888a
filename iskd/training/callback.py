"""The only place where a running model changes: one Lightning epoch is one stage.

At the start of a stage, on every rank alike and in this order: decide (rank 0, broadcast), edit, optimizer, strategy,
log. At its end: measure, check the quality floor, decide the next stage, write a checkpoint. A resumed run enters
with its state restored and a data position in the middle of a stage; nothing here depends on Lightning's own loop
counters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from iskd.data import TextData
from iskd.models import sharding, surgery
from iskd.plan import Stage
from iskd.plan.metric_names import QUALITY
from iskd.plan.options import RunOptions
from iskd.schedules import Schedule, forecast, planned_steps, stage_steps
from iskd.system import Ranks
from iskd.system.faults import NonFiniteError, advice, is_out_of_memory
from iskd.system.stop_signals import StopSignals
from iskd.system.watchdog import Watchdog
from iskd.training.deciding import Importance, check_importance, decide, divergence, history_of
from iskd.training.editing import back_to, carry_out, settle
from iskd.training.loggers import log_row, log_values
from iskd.training.movement import MovementCheck, require_moved
from iskd.training.plan_table import announce, check_alignment
from iskd.training.stage_clock import StageClock
from iskd.training.state import RunState, Saver, Tournament, checkpoint, checkpoint_files
from iskd.training.state.run_state import Status
from iskd.training.step import DistillModule, MfuMeter, StepGuard, check_partition, make_optimizer, watched_parameters
from iskd.training.step.optimizer import load_optimizer_tensors, optimizer_tensors
from iskd.training.strategies import ranks_of, rewrap, whole_device

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
        check_importance(schedule, importance)
        self.schedule, self.importance, self.data, self.run_dir = schedule, importance, data, run_dir
        self.state, self.options, self.resume_from, self.teacher = state, options, resume_from, teacher
        self.signals, self.saver = StopSignals(), Saver(run_dir, options)
        self.preempted = self.restarting = False
        self._ranks, self.watchdog = Ranks(), Watchdog(Ranks(), "")
        self._movement = MovementCheck(options.movement_steps)
        self._steps = 0  # optimizer steps in this stage
        self._clock = StageClock()
        self._carried: dict[str, Tensor] | None = None  # optimizer state after an edit that was made before the fit

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the whole run so far."""
        return self.state.steps + self._steps

    @property
    def leaving(self) -> bool:
        """Whether the process ends here although the run is not complete."""
        return self.preempted or self.restarting

    # ---- start ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """With `schedule.restart_at_edit`: carry out a pending edit before the strategy wraps anything."""
        state, module = self.state, cast(DistillModule, pl_module)
        self._ranks = ranks_of(trainer)
        module.guard = StepGuard(self._ranks)
        self.watchdog = Watchdog(self._ranks, f"Continue with resume={self.run_dir}")
        self.watchdog.start()
        found = None if self.resume_from is None else self.resume_from.name
        self._ranks.require_equal("newest whole checkpoint, teacher", [found, state.tokens, self.teacher])
        if not self.schedule.restart_at_edit or self.resume_from is None or state.stage is None or state.edited:
            return
        for model in (module.student, module.teacher):
            nn.Module.to(model, whole_device(trainer.strategy))
        optimizer = make_optimizer(module.optim)
        module.regroup(optimizer)
        checkpoint.restore(self.resume_from, module.student, optimizer, rng=False)
        self._carry_out(trainer, module, optimizer)
        sharding.from_first_rank(module.student)
        self._carried = dict(optimizer_tensors(optimizer, module.student))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the teacher and decide the first stage, or take up a resumed run."""
        module, state = cast(DistillModule, pl_module), self.state
        self.signals.install()
        module.stop_wanted = lambda: self.signals.received is not None
        check_alignment(module.student, self.schedule)
        module.place_teacher()
        forward_context = trainer.precision_plugin.forward_context
        if not self.options.plan_only:
            with forward_context():  # a cache holds what a teacher of the run's precision says
                module.open_cache(self.data)
            if self.options.mfu:
                self._clock.meter = MfuMeter(module.device, forward_context, devices=trainer.world_size)
        if self.resume_from is not None:
            self._take_up(trainer, module, self.resume_from)
            return
        state.identity = self._identity(trainer)
        state.results.append(state.row(module.student, "teacher", self._measure(trainer, module), None, "kept"))
        log_row(trainer.loggers, state.results[-1], state.steps)
        self._decide(trainer, module)
        plan = forecast(self.schedule, history_of(state, module))
        steps = planned_steps(plan, self._step_tokens(trainer))
        state.total_steps, state.total_stages = max(1, sum(steps)), len(plan)
        windows = torch.cat(self.data.calibration(self._step_tokens(trainer)))[: self.data.batch_size].to(module.device)
        with forward_context():
            announce(module, plan, steps, self._step_tokens(trainer), windows, self._ranks, self.run_dir)
        if self.options.plan_only:
            trainer.should_stop = True
            self.data.set_stage(0, 1)
            return
        self._save(trainer, module)
        self._begin(trainer, module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from Lightning, whose handlers were installed after `on_fit_start`."""
        self.signals.install()

    def _take_up(self, trainer: L.Trainer, module: DistillModule, path: Path) -> None:
        """Optimizer, weights and random numbers of a checkpoint, and the stage it lies in."""
        state, optimizer = self.state, trainer.optimizers[0]
        state.take_up(self._identity(trainer))
        module.regroup(optimizer)
        carried, self._carried = self._carried, None
        checkpoint.restore(path, module.student if carried is None else None, optimizer, self._ranks.rank)
        if carried is not None:
            load_optimizer_tensors(optimizer, module.student, carried)
        rewrap(trainer.strategy)  # what trains may differ from what the strategy wrapped at start-up
        self.saver.find_boundary()
        if carried is not None:
            self._settle_edit(trainer, module)
        elif state.edited and state.stage is not None:
            self._movement.watch(module.student, watched_parameters(module.student, state.record, state.stage))
        self._begin(trainer, module)

    def _begin(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Carry out stages without training, and point the data at what is left of the one with training."""
        state = self.state
        while state.stage is not None and not self.leaving and not self._left(trainer):
            if not state.edited:
                self._edit(trainer, module)
            self._end(trainer, module)
        if state.stage is None or self.leaving:
            trainer.should_stop = True
            self.data.set_stage(state.first_batch, 1)  # Lightning asks for a loader even when there is nothing to train
            return
        self._steps = state.batch // trainer.accumulate_grad_batches
        module.tokens, module.stage, module.stage_number = state.tokens, state.stage, len(state.finished) + 1
        self.data.set_stage(state.first_batch + state.batch, self._left(trainer))

    def _decide(self, trainer: L.Trainer, module: DistillModule) -> None:
        start, windows = time.perf_counter(), partial(self.data.calibration, self.options.score_tokens)
        context = trainer.precision_plugin.forward_context
        decide(self.schedule, self.importance, self.state, module, windows, self._ranks, context)
        self.state.seconds += time.perf_counter() - start  # scores are part of what the chosen stage costs

    # ---- edit -------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply the stage's edits, unless a resumed run is already past them."""
        self._clock.lap()
        if not self.state.edited:
            self._edit(trainer, cast(DistillModule, pl_module))
        self._clock.train(self.state.tokens)

    def _edit(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Edit, optimizer, strategy, log; the decision was made at the end of the stage before."""
        self._carry_out(trainer, module, trainer.optimizers[0])
        rewrap(trainer.strategy)
        self._settle_edit(trainer, module)

    def _carry_out(self, trainer: L.Trainer, module: DistillModule, optimizer: torch.optim.Optimizer) -> None:
        state, stage = self.state, self.state.stage
        assert stage is not None
        fits = stage.fit and stage.edits and self.options.fit_tokens
        batches = self.data.calibration(self.options.fit_tokens) if fits else []
        events = carry_out(module, optimizer, stage, batches, trainer.precision_plugin.forward_context)
        state.record, state.edited = module.record, True
        state.events += events

    def _settle_edit(self, trainer: L.Trainer, module: DistillModule) -> None:
        """What follows every edit: the checks that it took, and its quality before healing."""
        state, stage = self.state, self.state.stage
        assert stage is not None
        module.stage_number = len(state.finished) + 1
        check_partition(trainer.optimizers[0], module.student)
        self._movement.watch(module.student, watched_parameters(module.student, state.record, stage))
        self._steps, self._clock.speed = 0, None
        if self.options.measure_before and stage.edits:
            quality = self._measure(trainer, module)
            state.before = {key: quality[key] for key in QUALITY}
        if trainer.is_global_zero:
            size = surgery.parameters(module.student)
            _log.info("stage %d: %s, %d parameters", module.stage_number, stage.name, size)

    # ---- train ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the factor on the learning rates for the coming step."""
        self._clock.batch_starts()
        module, stage = cast(DistillModule, pl_module), cast(Stage, self.state.stage)
        module.steps = self.state.steps + self._steps
        module.lr_scale = module.optim.scale(
            self._steps, self._stage_steps(trainer, stage), self.state.steps, self.state.total_steps, stage.shape
        )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Every new parameter must have a gradient: one without is not part of the graph or of the synchronisation."""
        self._movement.check_gradients()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """Count; at optimizer steps check that new parameters move and write a checkpoint now and then."""
        module, state = cast(DistillModule, pl_module), self.state
        state.batch += 1
        state.tokens += batch["input_ids"].numel() * trainer.world_size
        module.tokens = state.tokens
        if not state.batch % trainer.accumulate_grad_batches:
            self._stepped(trainer, module)
        self._clock.batch_ends(batch)

    def _stepped(self, trainer: L.Trainer, module: DistillModule) -> None:
        """After an optimizer step."""
        state = self.state
        self._steps += 1
        last = not self._left(trainer)
        due = not last and not self._steps % self.options.checkpoint_every
        verdicts = module.guard.settle(now=last or due or self._movement.watching)
        state.count_steps(verdicts, most=self.options.max_skipped)
        if self._steps == 1:
            sharding.check_roots(module.student)
        skipped = any(verdict.skipped for verdict in verdicts)
        still = self._movement.stepped(module.lr_scale * module.stage.lr_new, skipped=skipped, last=last)
        if still is not None:
            require_moved(self._ranks.gather(still), split=sharding.is_sharded(module.student))
        if any(verdict.stopping for verdict in verdicts):
            self.preempted = trainer.should_stop = True
        if self.preempted or due:
            self._tick()
            self._save(trainer, module)

    # ---- end --------------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, keep or roll back, decide what comes next."""
        module = cast(DistillModule, pl_module)
        if self.preempted:
            return
        self._tick()
        values = self._clock.end(module, self.state.tokens)
        log_values(trainer.loggers, values, self.state.tokens, len(self.state.finished) + 1, self.steps_done)
        self._end(trainer, module)
        self._begin(trainer, module)

    def _end(self, trainer: L.Trainer, module: DistillModule) -> None:
        state, stage = self.state, self.state.stage
        assert stage is not None
        settle(module, trainer.optimizers[0])
        state.events += module.alignment()
        if state.tournament is not None:
            self._judge(trainer, module, state.tournament)
            return
        quality = self._measure(trainer, module)
        floor = self.schedule.floor if stage.edits else None
        missed = self._ranks.first(floor is not None and quality["retention"] < floor)
        if missed:
            state.events.append(
                f"retention {quality['retention']:.4f} is below schedule.floor={floor}: stage rolled back, "
                "the run ends with the student before it"
            )
        status: Status = "rolled_back" if missed else "kept"
        state.results.append(state.row(module.student, stage.name, quality, self._clock.speed, status))
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
        (self.preempted,) = self._ranks.any(self.signals.received is not None)

    def _roll_back(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Put student, record and optimizer back to the last stage boundary, and end the run."""
        self._back(trainer, module)
        self.state.stage = None
        log_row(trainer.loggers, self.state.results[-1], self.state.steps)
        self._save(trainer, module)

    def _judge(self, trainer: L.Trainer, module: DistillModule, trials: Tournament) -> None:
        """End of a trial: back to where it began, and on. Trials choose layers, so calibration text judges them."""
        state, windows = self.state, self.data.calibration(self.data.val_tokens)
        with trainer.precision_plugin.forward_context():
            kl = self._ranks.first(divergence(module, windows))
        trials = trials.judged(kl)
        self._back(trainer, module)
        state.tournament = None if trials.over else trials
        state.stage, state.events = trials.stage, [*state.events, *([trials.verdict()] if trials.over else [])]
        self._save(trainer, module)

    def _back(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Student, record and optimizer as they were at the last stage boundary."""
        assert self.saver.boundary is not None, "the last boundary is always kept"
        state, before = self.state, self.state.finished[-1] if self.state.finished else Stage("start")
        state.record = back_to(self.saver.boundary, module, trainer.optimizers[0], before)
        rewrap(trainer.strategy)
        state.edited, state.batch, state.before = False, 0, None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say where the last good state is when numbers blow up or memory runs out."""
        if isinstance(exception, NonFiniteError) or is_out_of_memory(exception):
            where, good = cast(DistillModule, pl_module).where(), checkpoint_files.newest(self.saver.root)
            sizes = {"data.batch_size": self.data.batch_size, "data.seq_len": self.data.seq_len}
            exception.args = (advice(exception, where, sizes, good),)

    def close(self, *, failed: bool = False) -> None:
        """Put back what the run took: the connections to the other ranks and the signals."""
        self.watchdog.close(failed=failed)
        self.signals.uninstall()

    def _tick(self) -> None:
        """Add the time since the last call to the stage's."""
        self.state.seconds += self._clock.lap()

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _step_tokens(self, trainer: L.Trainer) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.data.batch_size * self.data.seq_len * trainer.accumulate_grad_batches * trainer.world_size

    def _identity(self, trainer: L.Trainer) -> dict[str, Any]:
        layout = {"processes": trainer.world_size, "accumulate": trainer.accumulate_grad_batches}
        return {**self.data.identity(), **layout, "teacher": self.teacher, "precision": str(trainer.precision)}

    def _stage_steps(self, trainer: L.Trainer, stage: Stage) -> int:
        return stage_steps(stage, self.state.finished, self.state.steps, self._step_tokens(trainer))

    def _left(self, trainer: L.Trainer) -> int:
        """Micro-batches of the stage in progress that are still to be trained."""
        assert self.state.stage is not None
        return self._stage_steps(trainer, self.state.stage) * trainer.accumulate_grad_batches - self.state.batch

    def _measure(self, trainer: L.Trainer, module: DistillModule) -> dict[str, float]:
        with trainer.precision_plugin.forward_context():
            return module.measure(self.data.validation())

    def _save(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Write a checkpoint; with `schedule.restart_at_edit` the process ends at one that an edit follows."""
        state = self.state
        self.saver.save(module.student, trainer.optimizers[0], state, self._ranks, trainer.loggers)
        if not state.edited:
            self.restarting = self.schedule.restart_at_edit and state.stage is not None and bool(state.stage.edits)
