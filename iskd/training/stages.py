"""The stage loop: one stage after another, from a copy of the teacher to the finished student.

    begin                    measure the teacher, decide the first stage, print the plan; or take up a resumed run
    while advance:
        edit                 structure, fit, optimizer groups, strategy; the proof that it took; quality before healing
        train                after each micro-batch: count, watch new parameters move, write a checkpoint now and then
        end                  measure, keep or roll back, decide what comes next, save

`StageLoop.run` is that loop with any function in the place of `train`; `iskd.training.callback` calls the same pieces
from the hooks of a Lightning fit, in which one epoch is one stage. Nothing here knows Lightning: what a loop needs of a
trainer is `Live`. All of it happens on every rank alike; what one rank decides, it decides for all (`Ranks`).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.data import TextData
from iskd.evaluation import EvalSpec, measure_quality
from iskd.models import Stack, sharding, surgery
from iskd.plan import Stage
from iskd.plan.options import RunOptions
from iskd.plan.run_files import PLAN_FILE
from iskd.schedules import Schedule, forecast, planned_steps
from iskd.schedules.mixed import of_stage
from iskd.system import Busy, read_json
from iskd.system.faults import NonFiniteError, UnfinishedError, advice, is_out_of_memory
from iskd.system.text import argument
from iskd.training.deciding import (
    Importance,
    check_edits,
    check_floor,
    check_importance,
    check_merges,
    decide,
    history_of,
    no_better_than_guessing,
    scoring_ahead,
)
from iskd.training.editing import BrokenOffError, Edited, Editor, merge_adapters
from iskd.training.live import Live
from iskd.training.metrics import StageClock, log_row, log_values
from iskd.training.metrics.along import AlongTheRun
from iskd.training.metrics.costs import (
    Costs,
    check_every,
    export_seconds,
    quantizing_seconds,
    speaking_seconds,
    trials_ahead,
    writing,
)
from iskd.training.metrics.loggers import log_inside
from iskd.training.movement import MovementCheck, require_moved
from iskd.training.plan_table import announce, check_alignment
from iskd.training.state import RunState, Saver, Status, StudentKeeper, back_to, checkpoint_files
from iskd.training.step import MfuMeter, check_partition, watched_parameters
from iskd.training.step_count import StepCount

_log = logging.getLogger(__name__)
T = TypeVar("T")


class StageLoop:
    """Runs a schedule.

    Args:
        schedule: decides the stages. importance: scores layers when the schedule asks for it.
        data: the run's data module. run_dir: where checkpoints and `stages.json` go.
        state: where the run stands; a fresh one at the start. options: see `RunOptions`.
        teacher, config: digests of the teacher's weights and of the run's config; a resumed run must find the same.
        editor: where edits are carried out; None = between two stages of this process.
        tokens_told: what the plan says of its tokens.
        along: asks the student at the start and after every stage; None = nobody does.
        spec: what the run asks, along it or at its end, and how often it validates inside a stage; None = nothing.
        keep: keeps the students of stages; None = the last one alone is left.
        exports: whether the student is written at the end.
        few: ask a little of what the student is going to be asked, for the plan, each with how many times as much there
            is; none = it is asked all before the plan, or nothing.

    Attributes:
        preempted: the run was stopped, and everything is saved.
    """

    def __init__(
        self,
        schedule: Schedule,
        importance: Importance | None,
        data: TextData,
        run_dir: Path,
        state: RunState,
        options: RunOptions,
        teacher: str | None = None,
        config: str | None = None,
        editor: Editor | None = None,
        tokens_told: str = "",
        along: AlongTheRun | None = None,
        spec: EvalSpec | None = None,
        keep: StudentKeeper | None = None,
        exports: bool = False,
        few: Sequence[tuple[AlongTheRun, float]] = (),
    ) -> None:
        check_importance(schedule, importance)
        self.schedule, self.importance, self.data, self.run_dir = schedule, importance, data, run_dir
        self.state, self.options, self.teacher, self.config = state, options, teacher, config
        self.saver, self.clock = Saver(run_dir, options), StageClock()
        self.editor, self.tokens_told = editor or Editor(), tokens_told
        self.along, self.spec, self.keep = along, spec, keep
        self.every = None if spec is None else spec.inside
        self.exports, self.few = exports, few
        self.preempted = False
        self._seconds: dict[str, float] = {}  # what measuring takes, as the plan tells
        self._movement = MovementCheck(options.movement_steps)
        self._validated: dict[int, Tensor] = {}  # the teacher's side of validation, which stays the same
        self._live: Live | None = None

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self, live: Live, train: Callable[[Stage], None], resume_from: Path | None = None) -> None:
        """The whole run, as it reads; the hooks of a Lightning fit call the same pieces in the same order.

        Args:
            live: what trains.
            train: trains the micro-batches of `data.train_dataloader()`: calls `before_training`, and for each
                `before_batch` and `after_batch`.
            resume_from: the checkpoint that `state` was read from; None = the run starts.
        """
        self.begin(live, resume_from)
        while (stage := self.advance()) is not None:
            train(stage)
            if self.preempted:
                break
            self.end(trained=True)

    def begin(self, live: Live, resume_from: Path | None = None) -> None:
        """Measure the teacher and decide the first stage, or take up a resumed run."""
        self._live = live
        module, state = live.module, self.state
        self.clock.lap()
        check_alignment(module.student, self.schedule)
        if resume_from is None:
            self._check_room()
        module.place_teacher()
        if not self.options.plan_only:
            with live.forward_context():  # a teacher cache holds what a teacher of the run's precision says
                module.open_teacher_cache(self.data)
            try:
                with live.alone():
                    if self.options.mfu:
                        self.clock.meter = MfuMeter(module.device, live.forward_context, devices=live.ranks.size)
            except BrokenOffError:
                self.preempted = True
                if resume_from is None:
                    state.run_complete()
                return
        if resume_from is not None:
            self._take_up(resume_from)
            self._check_room()
            self.clock.lap()  # the time of a stage is none of taking it up
            return
        state.begin(self._identity())
        try:
            self._start()
        except BrokenOffError:  # nothing is lost: a run that is taken up starts from its beginning
            state.run_complete()
            self.preempted = True
            return
        if not self.options.plan_only:
            self._save()

    def _start(self) -> None:
        """Measure the teacher, and the student that the run goes on from; decide the first stage; tell the plan.

        Raises:
            BrokenOffError: a stop signal came.
        """
        live, state, module, start = self.live, self.state, self.live.module, time.perf_counter()
        stand_ins = dict.fromkeys(state.record.layers, 0.0)  # scores are made below
        history = replace(history_of(state, module, self.data.pass_tokens), scores=stand_ins)
        check_edits(self.schedule, module.teacher, history)
        plan = forecast(self.schedule, history)
        check_merges(plan, module.teacher, lambda stage: self.editor.fit_text(stage, live.ranks))
        check_floor(self.schedule, plan, self.editor.refits_after)
        self.editor.check_refits(module, plan)
        self.clock.lap()
        with live.breaking_off(module.teacher):
            quality = self._told("measuring the teacher", lambda: self._measure(module.teacher))
            self._seconds["teacher"] = taken = time.perf_counter() - start
            # from now on the teacher's side is remembered, which is one of two passes
            tokens = len(self.data.validation_windows()) * self.data.seq_len / live.ranks.size
            student = tokens / quality["tokens_per_s"]
            self._seconds["validation"] = max(taken - student, student) / live.speedup
        with live.alone():
            asked = self._asked(module.teacher)
        self._tick()
        row = state.stage_measured(module.teacher, "teacher", quality, None, "kept", asked)
        log_row(live.loggers, row, state.first_step)
        if state.record.edits:  # the student of an earlier run
            with live.breaking_off(module.teacher, module.student):
                quality = self._told("measuring the student", self._measure)
            with live.alone():
                asked = self._asked()
            self._tick()
            row = state.stage_measured(module.student, "as given", quality, None, "kept", asked, state.record.edits)
            log_row(live.loggers, row, state.first_step)
        self._seconds["begun"] = time.perf_counter() - start
        self._decide()
        with live.alone():
            self._sample()
            self._told("measuring a step for the plan", self._announce)
        self.clock.lap()  # the plan itself is in nobody's time

    def advance(self) -> Stage | None:
        """Carry out the edits of the next stage and point the data at it; None where the run, or the process, ends.

        Every edit of a run is taken up here; where edits need a fresh process, it has carried out the first one before
        (`Editor`). Stages without training end here too.
        """
        state = self.state
        while (stage := state.stage) is not None and not self.leaving and not self.options.plan_only:
            if not state.edited:
                self.edit()
            if self.preempted:
                break
            if left := self.count.batches_left:
                self._enter()
                self.data.set_stage(state.first_batch + state.batch, left)
                return stage
            self.end(trained=False)
        self.data.set_stage(state.first_batch, 1)  # a fit asks for a loader even when there is nothing to train
        return None

    @property
    def leaving(self) -> bool:
        """Whether the process ends here although the run is not complete."""
        return self.preempted or self.editor.leaves_before(self.state)

    # ---- begin ------------------------------------------------------------------------------------------------------

    def _take_up(self, path: Path) -> None:
        """Weights, optimizer state and random numbers of a checkpoint, and the stage it lies in."""
        live, state = self.live, self.state
        state.take_up(self._identity())
        live.module.regroup(live.optimizer)
        self.editor.restore(path, live.module, live.optimizer, live.ranks.rank)
        live.rewrap()  # what trains may differ from what was wrapped at start-up
        self.saver.find_boundary()
        if state.edited and state.stage is not None:
            self._watch(state.stage)

    def _announce(self) -> None:
        """Print the stages ahead, what they take, and how they are estimated."""
        live, state = self.live, self.state
        plan = forecast(self.schedule, history_of(state, live.module, self.data.pass_tokens))
        step_tokens = self.count.step_tokens
        steps = planned_steps(plan, step_tokens)
        state.plan_ahead(steps)
        windows = torch.cat(self.data.calibration(step_tokens))[: self.data.batch_size].to(live.module.device)
        sources = self.data.plan_mix(sum(steps) * step_tokens)
        if live.ranks.rank == 0:
            for line in sources:
                _log.info("data: %s", line)
        data = self.data
        batch = f"{data.batch_size} x {data.seq_len} tokens"
        alone = " (a plan starts none: measured by one)" if live.planned else ""
        layout = f", x {live.accumulate} accumulated" * (live.accumulate > 1)
        layout += f", x {live.processes} processes{alone}" * (live.processes > 1)
        text = f"steps of {batch}{layout}, on {data.named}"
        with live.forward_context():
            costs, told = self._costs(plan), self.tokens_told
            announce(
                live.module, plan, steps, step_tokens, windows, live.ranks, self.run_dir, costs, text, told, self._ends,
                live.speedup,
            )  # fmt: skip

    def _costs(self, plan: Sequence[Stage]) -> Costs:
        """What the parts of the stages ahead take, but for a training token, which is measured last."""
        options, seconds = self.options, self._seconds
        history = history_of(self.state, self.live.module, self.data.pass_tokens)
        along = self.spec is not None and self.spec.along
        # where a plan alone asks a few items, its run asks all: of the teacher, as student too, and of a student given
        left = len(self.state.results) + 1 if along and self.along is None else 0
        depth = self.live.module.teacher.config.num_hidden_layers
        whole = not sharding.is_sharded(self.live.module.teacher)  # else nobody's speed is measured
        at_the_end = whole * options.efficiency_seconds + self._asking * (1 if along else 2)
        return Costs(
            refit_tokens=self.editor.refit_tokens_of,
            fit_tokens=lambda stage: self.editor.fit_tokens_of(stage, depth),
            begun=seconds["begun"] + left * self._asking,
            validation=seconds["validation"],
            asking=self._asking if along else 0.0,
            scoring=scoring_ahead(self.schedule, self.importance, history, plan, seconds["scores"]),
            score_tokens=options.score_tokens * len(self.state.record.layers),
            trials=trials_ahead(self.schedule, history),
            before=options.measure_before,
            every=self.every,
            keeping=writing(self.keep is not None),
            saving=writing(True) / 2,
            checkpoint_every=options.checkpoint_every,
            ends=at_the_end,
        )

    @property
    def _asking(self) -> float:
        """Seconds in which a student says something to all tasks and text; the teacher's answers are kept."""
        asked = self.along.seconds if self.along is not None else []
        if not asked:
            return self._seconds.get("asking", 0.0)
        return asked[1] if len(asked) > 1 else asked[0] / 2

    def _ends(self, token: float) -> float:
        """Seconds of the export, the samples and weights in fewer bits, by those of a training token."""
        module, spec = self.live.module, self.spec
        written = export_seconds(surgery.parameters(module.student)) if self.exports else 0.0
        kinds = 0 if spec is None or sharding.is_sharded(module.teacher) else len(spec.quantize)
        packed = 0.0 if spec is None else quantizing_seconds(kinds, spec.tokens, token, module.device)
        return written + packed + speaking_seconds(self.options.samples, token, module.device)

    def _sample(self) -> None:
        """Ask a few of the items that the run is going to ask, so that the plan can tell how long all of them take."""
        try:
            for asking, _ in self.few:
                for _ in range(2):  # the first time items are drawn, and the teacher is asked as well
                    asking.ask(self.live.module.teacher, look=self.live.look)
        except Exception as error:  # of what is wrong with it the end of the run tells
            _log.warning("the plan does not tell how long tasks and text take: %s", error)
            return
        self._seconds["asking"] = sum(times * asking.seconds[1] for asking, times in self.few)

    def _check_room(self) -> None:
        """Raise ValueError where what is to be measured or kept along the run has no room in it.

        Before anything is measured: which layers are chosen changes neither how many stages there are nor their tokens.
        """
        live, state = self.live, self.state
        ahead, tokens = state.total_stages, state.total_steps * self.count.step_tokens
        if not state.results:
            history = history_of(state, live.module, self.data.pass_tokens)
            plan = forecast(self.schedule, replace(history, scores=dict.fromkeys(state.record.layers, 0.0)))
            ahead, tokens = len(plan), sum(planned_steps(plan, self.count.step_tokens)) * self.count.step_tokens
        check_every(self.every, tokens)
        self.data.check_validation(live.processes)
        if self.keep is not None:
            self.keep.check(live.module.student, ahead - len(state.finished))

    def _decide(self) -> None:
        """Ask the schedule for the next stage, with fresh scores where it wants them."""
        live, start = self.live, time.perf_counter()
        windows = partial(self.data.calibration, self.options.score_tokens)

        def decided() -> None:
            module, ranks, context = live.module, live.ranks, live.forward_context
            tokens = self.data.pass_tokens
            decide(self.schedule, self.importance, self.state, module, windows, ranks, context, tokens)

        with live.breaking_off():
            self._told("deciding which layers are edited", decided, "scores", ("score",))
        self._seconds["scores"] = time.perf_counter() - start
        self._tick()  # scores are part of what the chosen stage costs

    # ---- edit -------------------------------------------------------------------------------------------------------

    def edit(self) -> None:
        """Carry out the stage's edits, prove that they took, and measure what they cost before healing."""
        live, state, stage = self.live, self.state, self.stage
        self._tick()  # the checkpoint before it

        def made() -> Edited:
            alike = live.breaking_off if live.ranks.size > 1 else nullcontext
            return self.editor.carry_out(
                live.module, live.optimizer, stage, live.forward_context, state.finished, alike
            )

        # a refit that reads all of its text takes much longer than one that reads a share, or none
        kind, start = f"edit, {stage.refit_share:g} of its refits' text", time.perf_counter()
        try:
            # refits share out windows and layers among processes, which so call unlike numbers of modules: all agree
            # on a stop between two blocks
            with live.alone():
                edited = self._told(f"{stage.name}: edits, fits and refits", made, kind, ("fit", "refit"))
        except BrokenOffError:
            self.preempted = True
            return
        if stage.edits:
            self._seconds[kind] = time.perf_counter() - start
        live.rewrap()
        state.edit_made(edited.record, edited.events)
        self._enter()
        check_partition(live.optimizer, live.module.student)
        self._watch(stage)
        self.clock.speed, self.clock.refit = None, edited.refit_seconds
        # without training it is the quality at the end of the stage, which is measured then
        if self.options.measure_before and stage.edits and self.count.batches_left:
            try:
                with live.breaking_off(live.module.teacher, live.module.student):
                    state.measured_before(self._told("measuring the student", self._measure, "validation"))
            except BrokenOffError:
                self.preempted = True
                return
        if live.ranks.rank == 0:
            size = surgery.parameters(live.module.student)
            _log.info("stage %d: %s, %d parameters", self.count.stage_number, stage.name, size)
        self._tick()

    def _watch(self, stage: Stage) -> None:
        student = self.live.module.student
        self._movement.watch(student, watched_parameters(student, self.state.record, stage))

    # ---- train ------------------------------------------------------------------------------------------------------

    def before_training(self) -> None:
        """The stage's micro-batches come next."""
        if self._validates and not self.state.batch % self.live.accumulate:  # where an earlier process was broken off
            self._validate_inside()
        self._tick()
        self.clock.train(self.state.tokens)

    def before_batch(self) -> None:
        """A micro-batch is there and comes next."""
        self.clock.batch_starts()

    def before_step(self) -> None:
        """An optimizer step comes next: every new parameter must have a gradient by now."""
        self._movement.check_gradients()

    def after_batch(self, batch: Mapping[str, Any]) -> None:
        """Count; at optimizer steps check that new parameters move and write a checkpoint now and then.

        Args:
            batch: the micro-batch that was trained, `input_ids` [B, T].
        """
        live, state, rate = self.live, self.state, self.live.module.position.rate
        state.batch_done(batch["input_ids"].numel() * live.ranks.size)
        self._enter()
        if not state.batch % live.accumulate:
            self._stepped(rate, batch)
        self.clock.batch_ends(batch)

    def _stepped(self, rate: float, batch: Mapping[str, Any]) -> None:
        """After an optimizer step with this factor on the learning rates, that `batch` came to last."""
        live, state = self.live, self.state
        step, last = self.count.in_stage, not self.count.batches_left
        due = not last and not step % self.options.checkpoint_every
        live.module.log_row(live.loggers)
        validates = self._validates
        verdicts = live.module.guard.settle(now=last or due or validates or self._movement.watching)
        state.count_steps(verdicts, most=self.options.max_skipped)
        if step == 1:
            sharding.check_roots(live.module.student)
        skipped = any(verdict.skipped for verdict in verdicts)
        still = self._movement.stepped(rate * self.stage.lr_new, skipped=skipped, last=last)
        if still is not None:
            require_moved(live.ranks.gather(still), split=sharding.is_sharded(live.module.student))
        if any(verdict.stopping for verdict in verdicts):
            self.preempted = True
        if validates and not self.preempted:
            self._validate_inside()
        if self.preempted or due:
            self._tick()
            if last:  # the process that goes on from here has not trained the stage
                self.clock.batch_ends(batch)
                self._log_speed()
            self._save()

    @property
    def _validates(self) -> bool:
        """Whether the student is to be measured inside the stage where it stands, and was not yet."""
        state, step_tokens = self.state, self.count.step_tokens
        if self.every is None or state.tournament is not None or not state.batch or not self.count.batches_left:
            return False
        passed = state.tokens // self.every > (state.tokens - step_tokens) // self.every
        return passed and not (state.inside and state.inside[-1]["tokens"] >= state.tokens)

    # ---- end --------------------------------------------------------------------------------------------------------

    def end(self, *, trained: bool) -> None:
        """Measure, keep or roll back, decide what comes next, save.

        Args:
            trained: whether this process has trained the stage, so that its speed is known.

        Raises:
            UnfinishedError: micro-batches of the stage are left to train.
        """
        live, state, stage = self.live, self.state, self.stage
        if trained:
            if self.count.batches_left:
                raise self.unfinished()
            self._tick()
            self._log_speed()
        else:
            self._log(self.clock.edits())
        merge_adapters(live.module, live.optimizer)
        state.note(live.module.alignment())
        if state.tournament is not None:
            self._judge()
            return
        before = copy.deepcopy(vars(state))
        try:
            self._close(stage)
        except BrokenOffError:
            vars(state).update(before)  # the stage is trained, and what follows is done again
            self.preempted = True
            sharding.reshard(live.module.student)
            if stage.train != "lora":  # whose adapters are merged: of them the last checkpoint is taken up
                self._save()
            return
        self._save()
        (self.preempted,) = live.ranks.any(live.stop_wanted())

    def _close(self, stage: Stage) -> None:
        """Measure a stage, keep or roll back, decide what comes next.

        Raises:
            BrokenOffError: a stop signal came; the student is as it was.
        """
        live, state = self.live, self.state
        with live.breaking_off(live.module.teacher, live.module.student):
            quality = self._told("measuring the student", self._measure, "validation")
        if self.options.measure_before and stage.edits and not self.count.stage_steps:
            state.measured_before(quality)
        floor = of_stage(self.schedule, stage).floor if stage.edits else None
        useless = no_better_than_guessing(quality, int(Stack(live.module.student).config.vocab_size))
        # asked so that a retention of nan does not pass
        missed = live.ranks.first(floor is not None and (useless != "" or not quality["retention"] >= floor))
        if useless:
            state.note([useless])
            _log.warning("stage %s: %s", stage.name, useless)
        if not missed and not live.ranks.first(math.isfinite(quality["ppl"]) and math.isfinite(quality["kl"])):
            raise NonFiniteError(
                f"stage {stage.name}: the student broke (perplexity {quality['ppl']:.4g}, KL {quality['kl']:.4g}): "
                "lower schedule.lr, edit less in a stage, or set schedule.floor to end with the student before it"
            )
        if missed:
            said = "below" if floor is not None and quality["retention"] < floor else "no quality for"
            state.note(
                [
                    f"retention {quality['retention']:.4f} is {said} schedule.floor={floor}: stage rolled back, "
                    "the run ends with the student before it"
                ]
            )
        status: Status = "rolled_back" if missed else "kept"
        with live.alone():
            asked = None if missed else self._asked()
            if not missed and self.keep is not None:
                self.keep.keep(live.module, state.record, len(state.results), live.ranks)
        self._tick()
        row = state.stage_measured(live.module.student, stage.name, quality, self.clock.speed, status, asked)
        if missed:
            self._back()
            state.run_complete()
        else:
            steps = self.count.stage_steps
            state.stage_kept(steps, steps * live.accumulate)
        log_row(live.loggers, row, state.first_step)
        if not missed:
            self._decide()

    def _log_speed(self) -> None:
        """Log how fast the stage was trained, at its end."""
        self._log(self.clock.end(self.live.module, self.state.tokens))

    def _log(self, values: Mapping[str, float]) -> None:
        """Log values of the stage where it stands."""
        if values:
            log_values(self.live.loggers, values, self.state.tokens, self.count.stage_number, self.count.in_run)

    def _judge(self) -> None:
        """End of a trial: back to where it began, and on. Trials choose layers, so calibration text judges them."""
        live = self.live
        batches = self.editor.text(live.ranks).not_fitted(self.data.calibration_batches(self.data.val_tokens))

        def measured() -> float:
            with live.forward_context():
                return float(measure_quality(live.module.student, live.module.teacher, batches)["kl"])

        try:
            with live.breaking_off(live.module.teacher, live.module.student):
                kl = live.ranks.first(self._told("judging a trial", measured, "judging"))
        except BrokenOffError:  # trained, and judged by the next process
            self.preempted = True
            sharding.reshard(live.module.student)
            if self.stage.train != "lora":
                self._save()
            return
        self._back()
        self.state.trial_judged(kl)
        self._save()

    def _back(self) -> None:
        """Student, record and optimizer as they were at the last stage boundary."""
        assert self.saver.boundary is not None, "the last boundary is always kept"
        live, state = self.live, self.state
        before = state.finished[-1] if state.finished else Stage("start")
        record = back_to(self.saver.boundary, live.module, live.optimizer, before)
        live.rewrap()
        state.rolled_back(record)

    def unfinished(self) -> UnfinishedError:
        """What to raise where whoever trains came back before the end of a stage, or of the run."""
        state, steps, kept = self.state, self.count, checkpoint_files.newest(self.saver.root)
        return UnfinishedError(
            f"INCOMPLETE: training was ended from outside the schedule in stage {steps.stage_number} of "
            f"{state.total_stages} ({self.stage.name}) after {steps.in_stage} of {steps.stage_steps} steps, e.g. by a "
            f"callback that sets trainer.should_stop. Nothing is exported. The newest checkpoint is {kept}; "
            f"without the callback, {argument('resume', self.run_dir)} goes on from there"
        )

    def advise(self, error: BaseException) -> None:
        """Have an error say where the last good state is when numbers blow up or memory runs out."""
        if isinstance(error, NonFiniteError) or is_out_of_memory(error):
            good = checkpoint_files.newest(self.saver.root)
            sizes = {"data.batch_size": self.data.batch_size, "data.seq_len": self.data.seq_len}
            error.args = (advice(error, self.live.module.where(), sizes, good),)

    # ---- where it stands --------------------------------------------------------------------------------------------

    @property
    def live(self) -> Live:
        """What trains; there from `begin` on."""
        assert self._live is not None, "begin comes first"
        return self._live

    @property
    def stage(self) -> Stage:
        """The stage in progress."""
        assert self.state.stage is not None
        return self.state.stage

    @property
    def count(self) -> StepCount:
        """Where the run stands, in steps."""
        live, data = self.live, self.data
        step_tokens = data.batch_size * data.seq_len * live.accumulate * live.processes
        return StepCount(self.state, step_tokens, live.accumulate)

    def _enter(self) -> None:
        """Tell the module which stage and step come next."""
        self.live.module.enter(self.stage, self.count.position(self.live.module.optim))

    def _identity(self) -> dict[str, Any]:
        layout = {"processes": self.live.processes, "accumulate": self.live.accumulate}
        config = {} if self.config is None else {"config": self.config}
        return {**self.data.identity(), **layout, **config, "teacher": self.teacher, "precision": self.live.precision}

    def _measure(self, model: PreTrainedModel | None = None) -> dict[str, float]:
        """Quality of the student, or of another model, on the validation windows."""
        module = self.live.module
        with self.live.forward_context():
            found = self.data.validation()
            return measure_quality(model or module.student, module.teacher, found, self._validated, intervals=True)

    def _told(self, what: str, work: Callable[[], T], like: str = "", promised: Sequence[str] = ()) -> T:
        """Do work, and say every few seconds that it is being done, and how long it may still take.

        `like` names what took as long before; `promised` the parts of the plan's time for the next stage, where nothing
        did.
        """
        if self.live.ranks.rank:
            return work()
        start, expected = time.perf_counter(), self._seconds.get(like)
        if expected is None and promised:
            expected = self._promised(promised)
        with Busy(what, expected=expected):
            found = work()
        if like:
            self._seconds.setdefault(like, time.perf_counter() - start)
        return found

    def _promised(self, parts: Sequence[str]) -> float | None:
        """Seconds that the plan of the run has for some parts of the stage that comes next; None = it has none."""
        try:
            row = read_json(self.run_dir / PLAN_FILE)[1 + len(self.state.finished)]
            return sum(float(row[f"{part}_seconds"]) for part in parts) or None
        except (OSError, ValueError, LookupError, TypeError, OverflowError):  # a plan may be missing, and anybody's
            return None

    def _validate_inside(self) -> None:
        """Measure the student where it stands, on the windows of every stage's end; no number of the run is changed."""
        live, state, start = self.live, self.state, time.perf_counter()
        try:
            with live.breaking_off(live.module.teacher, live.module.student):
                quality = self._told("measuring the student", self._measure, "validation")
        except BrokenOffError:  # saved where it stands; the next process begins with the measurement
            self.preempted = True
            sharding.reshard(live.module.student)
            return
        sharding.reshard(live.module.student)
        state.measured_inside(quality)
        log_inside(live.loggers, quality, state.tokens, self.count.stage_number, self.count.in_run)
        self.clock.apart(time.perf_counter() - start)

    def _asked(self, model: PreTrainedModel | None = None) -> dict[str, Any] | None:
        """What the student, or another model, says to tasks and text; None where nobody asks."""
        if self.along is None or self.options.plan_only:
            return None
        told = self.along.told(model or self.live.module.student, self.live.look)
        found: dict[str, Any] = self.live.ranks.first(told)
        return found

    def _tick(self) -> None:
        """Add the time since the last call to the stage's."""
        self.state.spent(self.clock.lap())

    def _save(self) -> None:
        """Write a checkpoint."""
        live, state = self.live, self.state
        self.saver.save(live.module.student, live.optimizer, state, live.ranks, live.loggers)
