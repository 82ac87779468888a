"""The LightningModule: frozen teacher, mutable student, one pure step, one logging site.

Three calls change it, and nobody sets an attribute of it: `hold` a student after an edit or a rollback, `enter` a stage
or the next place in it, `join` the other processes before the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.data import TextData
from iskd.data.loader import pinned
from iskd.losses import Chunk, Terms, check_terms, total_loss
from iskd.losses.topk_kl import TopK, topk_loss
from iskd.models import Signals, Stack, sharding
from iskd.models.packing import Separator
from iskd.plan import Record, Stage
from iskd.plan.metric_names import ALIGN
from iskd.system import Ranks
from iskd.teacher import TeacherCache, TeacherCacheSpec, TeacherStates, check_terms_cached
from iskd.training.step.alignment import align
from iskd.training.step.block_runner import BlockRunner, Recompute
from iskd.training.step.guard import StepGuard
from iskd.training.step.optimizer import OptimSpec, make_optimizer
from iskd.training.step.passes import Wanted, both, wanted
from iskd.training.step.position import Position
from iskd.training.step.shared_prefix import SharedPrefix
from iskd.training.step.spans import StepSpan, span
from iskd.training.step.trainable import regroup


@dataclass(frozen=True)
class StepResult:
    """What one pure step gives: the loss with its gradient, and every term's detached mean for the logs.

    `by_layer` are the detached values by layer of an objective that has them.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    by_layer: Mapping[int, Tensor] = field(default_factory=dict)


class DistillModule(L.LightningModule):
    """Holds the teacher outside the module tree and trains the student towards it.

    Args:
        student: the model that is edited and trained, float32 weights.
        teacher: the frozen original. It is in no state_dict, never in train mode and never wrapped.
        terms: loss and weight by name.
        optim: optimizer settings.
        record: the edits applied to `student` so far.
        chunk: tokens per chunk of logits; `auto` by the free memory, None = whole logits (`iskd.losses.chunk_size`).
        share_prefix: run leading blocks that are frozen and still the teacher's once for both
            (`iskd.training.step.shared_prefix`).
        stage: what trains, until the loop enters one.
        teacher_cache: what the teacher said about the training windows; with it training steps do not run the teacher,
            but those of stages that align layers. Of a `TeacherCacheSpec` it is opened before the fit
            (`open_teacher_cache`).
        gradient_checkpointing: run the student's blocks, or with "selective" all in them but linear maps and fused
            attention without dropout, a second time in the backward pass (`iskd.training.step.block_runner`).
        compile: compile the blocks of training steps; True or the name of a backend.
        separator: what tells documents apart, so that none sees another, in both models and in all that is computed
            of them until the fit is over; None = a window is one text. Raises ValueError when the teacher
            cannot (`Stack.keep_apart`).
    """

    teacher: PreTrainedModel

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        terms: Terms,
        optim: OptimSpec,
        record: Record,
        *,
        chunk: Chunk = "auto",
        stage: Stage | None = None,
        share_prefix: bool = True,
        teacher_cache: TeacherCache | TeacherCacheSpec | None = None,
        gradient_checkpointing: Recompute = False,
        compile: bool | str = False,
        separator: Separator | None = None,
    ) -> None:
        super().__init__()
        check_terms(terms)
        self.student = student.train()
        # kept out of the module tree: a registered teacher is saved, wrapped and put in train mode with the student
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.terms, self.optim, self.chunk = terms, optim, chunk
        self._record, self._stage, self._position = record, stage or Stage("start"), Position()
        self._prefix = SharedPrefix() if share_prefix else None
        self.blocks = BlockRunner(recompute=gradient_checkpointing, compile=compile)
        Stack(teacher).keep_apart(separator)
        Stack(student).keep_apart(separator, check=False)  # blocks and mixers can what the teacher can
        self.teacher_cache: TeacherCache | None = None
        self.teacher_states: TeacherStates | None = None
        self.teacher_cache_spec: TeacherCacheSpec | None = None
        if isinstance(teacher_cache, TeacherCacheSpec):
            check_terms_cached(terms, teacher_cache.kind)
            self.teacher_cache_spec = teacher_cache
        elif teacher_cache is not None:
            self.use_teacher_cache(teacher_cache)
        self.ranks, self.guard = Ranks(), StepGuard()
        self._stop_wanted: Callable[[], bool] = lambda: False
        self._finite: Tensor | None = None
        self._by_layer: Mapping[int, Tensor] = {}
        self._micro_batches: list[tuple[float, Mapping[str, Tensor]]] = []
        self._row: dict[str, Tensor | float] = {}

    @property
    def record(self) -> Record:
        """The edits applied to `student` so far."""
        return self._record

    @property
    def stage(self) -> Stage:
        """The stage in progress."""
        return self._stage

    @property
    def position(self) -> Position:
        """The place in the run of the micro-batch in progress, or of the next one."""
        return self._position

    def hold(self, student: PreTrainedModel, record: Record) -> None:
        """Train this student from now on: after an edit the same object, after a rollback another."""
        self.student, self._record = student, record

    def enter(self, stage: Stage, position: Position | None = None) -> None:
        """Take up a stage, or another place in the one in progress; None = the place stays."""
        self._stage, self._position = stage, position or self._position

    def join(self, ranks: Ranks, stop_wanted: Callable[[], bool]) -> None:
        """Agree with these processes before every optimizer step: whether it is finite, and whether one is to stop."""
        self.ranks, self.guard, self._stop_wanted = ranks, StepGuard(ranks), stop_wanted

    def stopping(self) -> bool:
        """Whether any process was asked to end the run; a collective, for work outside of steps."""
        return self.ranks.any(self._stop_wanted())[0]

    @contextmanager
    def plain_blocks(self) -> Iterator[None]:
        """Inside, the blocks of a step are neither recomputed nor compiled."""
        found, self.blocks = self.blocks, BlockRunner()
        try:
            yield
        finally:
            self.blocks = found

    def use_teacher_cache(self, teacher_cache: TeacherCache) -> None:
        """Read the teacher's side of every training step from `teacher_cache`.

        Raises ValueError when a term needs a signal that it does not hold.
        """
        check_terms_cached(self.terms, teacher_cache.spec.kind)
        self.teacher_cache = teacher_cache

    def open_teacher_cache(self, data: TextData) -> None:
        """With a `teacher_cache_spec`: read the teacher's answers from disk, computed when first read."""
        if self.teacher_cache_spec is None:
            return
        folder, tokenizer = data.cache_dir.parent / "teacher", str(data.manifest()["tokenizer"])
        windows = data.windows("train")
        self.use_teacher_cache(
            TeacherCache.open(self.teacher, windows, folder, self.teacher_cache_spec, tokenizer=tokenizer)
        )
        self.teacher_states = TeacherStates(self.teacher, folder)

    def teardown(self, stage: str) -> None:
        """After the fit both models read a window as one text again; nothing of it is in an export."""
        for model in (self.student, self.teacher):
            Stack(model).keep_apart(None)

    def configure_model(self) -> None:
        """Put student and teacher, two roots, into shards where the strategy has a mesh for them."""
        mesh = self.device_mesh
        for model in (self.student, self.teacher):  # after a rollback only the student is a new one
            if mesh is not None and not sharding.is_sharded(model):
                sharding.shard(model, mesh["data_parallel"])

    def regroup(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Give the optimizer what the stage trains and the losses reach (`iskd.training.step.trainable`)."""
        return regroup(optimizer, self.student, self.record, self.stage, self.terms)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer with the standing groups `base` and `new`; its rates are set before every step."""
        optimizer = make_optimizer(self.optim)
        self.regroup(optimizer)
        return optimizer

    def place_teacher(self) -> None:
        """Move the teacher to the student's device.

        It keeps float32 weights and runs under the student's autocast: an untouched student then has a KL of exactly 0.
        Casting the module to bf16 would also round its rotary frequencies, by up to 0.7 rad at position 511. Copies of
        its matrices in bf16 would spare autocast their rounding in every pass, at half their memory again: 0.4 % of a
        step's time on a CPU (6 layers of width 576, 1,024 tokens), within the noise of the teacher's pass.
        """
        nn.Module.to(self.teacher, self.device)

    def step(
        self,
        input_ids: Tensor,
        cached: Mapping[str, Tensor] | None = None,
        kept: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> StepResult:
        """Loss of windows [B, T]: a pure function of weights and batch.

        Args:
            input_ids: the windows.
            cached: what the teacher said about them (`TeacherCache.read`); None = it is run where terms use it.
            kept: numbers of their tokens that have a label (`iskd.models.packing`); None = they are found here.
            targets: which of their tokens [B, T] are to be predicted; None = all. Layers that are aligned one by one
                are on all tokens.
        """
        if self.stage.objective != "loss":
            return self._align(self.stage.objective, input_ids)
        stack, terms, record = Stack(self.student), self.terms, self.record
        theirs = None if cached is not None else wanted(terms, record, self.stage, of_teacher=True)
        shared = self._prefix.depth(self.student, self.teacher, record) if self._prefix and theirs else 0
        ours = wanted(terms, record, self.stage) or Wanted()
        with self.blocks.running(self.student, self.teacher):
            student, teacher = both(
                self.student, self.teacher, record, input_ids, ours, theirs, shared, kept=kept, targets=targets
            )
        if cached is not None and "ids" in cached:
            top = TopK(cached["ids"], cached["log_probs"])
            with span(StepSpan.LOSS):
                return StepResult(*topk_loss(terms, student, top, stack.head, chunk=self.chunk, softcap=stack.softcap))
        if cached is not None:
            teacher = Signals(student.labels, last_hidden=cached["last_hidden"])
        head = None if teacher is None else Stack(self.teacher).head
        with span(StepSpan.LOSS):
            loss, means = total_loss(terms, student, teacher, stack.head, head, chunk=self.chunk, softcap=stack.softcap)
        return StepResult(loss, means)

    def _align(self, objective: str, input_ids: Tensor) -> StepResult:
        """The step of a stage that aligns layers: the sum over them is minimised, their mean logged."""
        aligned = align(objective, self.student, self.teacher, self.record, input_ids)
        mean = torch.stack(list(aligned.by_layer.values())).mean()
        return StepResult(aligned.loss, {objective: mean}, aligned.by_layer)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a micro-batch; what it gives to the values of its step is kept for the log."""
        result = self.step(batch["input_ids"], self.cached(batch), batch.get("kept"), batch.get("targets"))
        finite = torch.isfinite(result.loss.detach())
        self._finite = finite if self._finite is None else self._finite & finite
        self._by_layer = result.by_layer
        share = self._share(batch)
        if self._logs():
            self._micro_batches.append((share, {"loss": result.loss.detach(), **result.terms}))
        return result.loss * share

    def _share(self, batch: Mapping[str, Any]) -> float:
        """What a micro-batch counts for in its step: the share of its tokens that have a label.

        A loss is the mean over the labels of one micro-batch. With documents apart some micro-batches have fewer, and
        the mean of such means would depend on how the windows of a step are laid out. Known without asking a device,
        since the loader counts the labels.
        """
        kept, (windows, length) = batch.get("kept"), batch["input_ids"].shape
        if kept is None or self.stage.objective != "loss":
            return 1.0
        return float(kept.numel() / (windows * (length - 1)))

    @span(StepSpan.LOADER)
    def cached(self, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """What the cached teacher said about a batch, on its device; None where the teacher is to be run."""
        if self.teacher_cache is None or self.stage.objective != "loss":
            return None
        if "index" not in batch:
            raise ValueError("teacher.cache finds rows by the windows' numbers: give batches an 'index', [B] integers")
        rows, device = self.teacher_cache.read(batch["index"]), batch["input_ids"].device
        return {name: pinned(values, device).to(device, non_blocking=True) for name, values in rows.items()}

    def _logs(self) -> bool:
        """Whether the step is one that loggers take (trainer.log_every_n_steps, 0 = none): values are made at no other.

        Steps are those of the run: Lightning counts from where a process began, so a resumed run would log others.
        A number is copied to the device, and that copy waits for what the device was asked before. Without a Trainer,
        as in a profile, nothing is logged.
        """
        if self._trainer is None:
            return False
        every = int(vars(self.trainer)["log_every_n_steps"])  # set by a part of the Trainer that types do not show
        return bool(every) and (self.position.step + 1) % every == 0

    def log_row(self, loggers: Iterable[Any]) -> None:
        """Give the values of the step to the loggers, before a checkpoint that is due: Lightning would do so after it.

        A run that is killed between the two continues behind the step, whose row would be lost.
        """
        row, self._row = self._row, {}
        # as the step was taken: before it, they are those of the step before
        row |= {f"lr/{group['name']}": float(group["lr"]) for group in self._optimizer().param_groups} if row else {}
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in row.items()}
        for logger in loggers if values else ():
            logger.log_metrics(values, int(values["step"]))
            logger.save()

    def _values(self) -> dict[str, Tensor | float]:
        """Loss and terms of the step, means over its labels however they lie in micro-batches, and its place."""
        labelled, self._micro_batches = [each for each in self._micro_batches if each[0]], []
        whole = sum(share for share, _ in labelled)
        values = {
            f"train/{name}": torch.stack([share / whole * means[name] for share, means in labelled]).sum()
            for name in (labelled[0][1] if labelled else ())
        }
        # the key "step" is what loggers take for their own counter; Lightning's restarts when a run is resumed
        at = self.position
        place = {"tokens": float(at.tokens), "stage": float(at.stage_number), "step": float(at.step)}
        return {**values, **place}

    def alignment(self) -> list[str]:
        """A sentence on how far each layer was from the teacher's in the latest step; none in a stage without."""
        values, self._by_layer = self._by_layer, {}
        listed = ", ".join(f"{layer}: {float(value):.4g}" for layer, value in values.items())
        return [f"{self.stage.objective} by layer in the last step: {listed}"] if values else []

    def where(self) -> str:
        """The place of the step in progress, for messages."""
        return f"at {self.position.tokens} tokens, stage {self.position.stage_number} ({self.stage.name})"

    def _optimizer(self) -> torch.optim.Optimizer:
        return cast(Any, self.optimizers(use_pl_optimizer=False))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the rates of both groups."""
        for group in optimizer.param_groups:
            group["lr"] = self.position.rate * (self.stage.lr_new if group["name"] == "new" else self.stage.lr)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm over both groups together; a step whose loss or gradient is not finite changes nothing."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = sharding.whole(torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters]))
        finite = torch.isfinite(norm) if self._finite is None else torch.isfinite(norm) & self._finite
        self._finite = None
        self.guard.judge(self.position.step + 1, optimizer, finite, stop=self._stop_wanted())
        if self.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optim.clip, norm)
        if self._logs():
            self._row = {**self._values(), "train/grad_norm": norm}
            self.log_dict(self._row, on_step=True, on_epoch=False, logger=False)
            self._row |= {f"{ALIGN}{layer}": value for layer, value in self._by_layer.items()}
