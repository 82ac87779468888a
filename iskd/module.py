"""The LightningModule: frozen teacher, mutable student, one pure step, one logging site."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd import sharding
from iskd.align import align
from iskd.arch import Stack
from iskd.capture import capture
from iskd.distributed import Ranks
from iskd.losses.base import Terms, check_terms, uses_teacher
from iskd.losses.chunked import total_loss
from iskd.metrics import QualityMetrics
from iskd.optim import OptimSpec, make_optimizer, regroup
from iskd.plan import Record, Stage
from iskd.signals import IGNORE, Signals


@dataclass(frozen=True)
class StepResult:
    """What one pure step gives: the loss with its gradient, and every term's detached mean for the logs.

    `by_layer` are the detached values by layer of an objective that has them.
    """

    loss: Tensor
    parts: Mapping[str, Tensor]
    by_layer: Mapping[int, Tensor] = field(default_factory=dict)


def next_tokens(input_ids: Tensor) -> Tensor:
    """Labels [B, T] of windows [B, T]: the next token, ignored at the last position."""
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], IGNORE)], dim=1)


class DistillModule(L.LightningModule):
    """Holds the teacher outside the module tree and trains the student towards it.

    Args:
        student: the model that is edited and trained, float32 weights.
        teacher: the frozen original. It is in no state_dict, never in train mode and never wrapped.
        terms: loss and weight by name.
        optim: optimizer settings.
        record: the edits applied to `student` so far.
        chunk: tokens per chunk of logits.
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
        chunk: int = 256,
    ) -> None:
        super().__init__()
        check_terms(terms)
        self.student = student.train()
        # kept out of the module tree: a registered teacher is saved, wrapped and put in train mode with the student
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.terms, self.optim, self.record, self.chunk = terms, optim, record, chunk
        self.stage = Stage("start")
        # factor and counters of the step in progress; the callback owns them
        self.tokens = 0
        self.stage_number = 0
        self.steps = 0
        self.lr_scale = 1.0
        # how the ranks agree before an optimizer step; the callback sets both
        self.ranks = Ranks()
        self.stop_wanted: Callable[[], bool] = lambda: False
        self.skipped = False  # whether the step just made was skipped, on every rank
        self.stopping = False  # whether a rank was asked to stop, on every rank
        self._finite: Tensor | None = None
        self._by_layer: Mapping[int, Tensor] = {}
        self._teacher_cache: dict[int, Tensor] = {}

    def configure_model(self) -> None:
        """Put student and teacher, two roots, into shards where the strategy has a mesh for them."""
        mesh = self.device_mesh
        for model in (self.student, self.teacher):  # after a rollback only the student is a new one
            if mesh is not None and not sharding.is_sharded(model):
                sharding.shard(model, mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with the standing groups `base` and `new`; its rates are set before every step."""
        optimizer = make_optimizer(self.optim)
        regroup(optimizer, self.student, self.record, self.stage)
        return optimizer

    def place_teacher(self) -> None:
        """Move the teacher to the student's device.

        It keeps float32 weights and runs under the student's autocast: an untouched student then has a KL of exactly 0.
        Casting the module to bf16 would also round its rotary frequencies, by up to 0.7 rad at position 511.
        """
        nn.Module.to(self.teacher, self.device)

    def signals(self, model: PreTrainedModel, input_ids: Tensor, layers: Sequence[int], wanted: set[int]) -> Signals:
        """One forward pass of `model`: last hidden state and the states after the wanted layers."""
        stack = Stack(model)
        with capture(stack, layers, wanted) as states:
            last = stack.last_hidden(input_ids)
        return Signals(labels=next_tokens(input_ids), last_hidden=last, hidden=dict(states))

    def step(self, input_ids: Tensor) -> StepResult:
        """Loss of windows [B, T]: a pure function of weights and batch."""
        if self.stage.objective != "loss":
            return self._align(self.stage.objective, input_ids)
        wanted = self._wanted()
        student = self.signals(self.student, input_ids, self.record.layers, wanted)
        teacher = None
        if any(uses_teacher(loss) for loss, _ in self.terms.values()):
            after = {layer: self.record.state_after(layer) for layer in wanted}
            with torch.no_grad():
                teacher = self.signals(self.teacher, input_ids, range(self.record.num_layers), set(after.values()))
            # the student's state after a layer stands for the teacher's state after the gap that follows it
            teacher.hidden = {layer: teacher.hidden[target] for layer, target in after.items()}
        stack = Stack(self.student)
        loss, parts = total_loss(
            self.terms,
            student,
            teacher,
            stack.head,
            Stack(self.teacher).head,
            chunk=self.chunk,
            softcap=stack.softcap,
        )
        return StepResult(loss, parts)

    def _align(self, objective: str, input_ids: Tensor) -> StepResult:
        """The step of a stage that aligns layers: the sum over them is minimised, their mean logged."""
        aligned = align(objective, self.student, self.teacher, self.record, input_ids)
        mean = torch.stack(list(aligned.by_layer.values())).mean()
        return StepResult(aligned.loss, {objective: mean}, aligned.by_layer)

    def _wanted(self) -> set[int]:
        """Layers whose states the losses compare."""
        wanted: set[int] = set()
        survivors = self.record.layers
        named = {
            "last": survivors[-1:],
            "all": survivors,
            "edited": self._standing_for(self.record.edited),
            "stage": self._standing_for(edit.layer for edit in self.stage.edits),
        }
        for loss, weight in self.terms.values():
            if "hidden" not in loss.needs or not weight:
                continue
            layers = getattr(loss, "layers", "all")
            wanted |= set(named[layers] if isinstance(layers, str) else layers) & set(survivors)
        return wanted

    def _standing_for(self, edited: Iterable[int]) -> Sequence[int]:
        """The layers whose states stand for the outputs of edited ones: of a removed layer, the survivor below it.

        Below a gap at the bottom there is none, so the first survivor does; where nothing is edited, the last layer.
        """
        survivors = self.record.layers
        below = {max((x for x in survivors if x <= layer), default=survivors[0]) for layer in edited}
        return sorted(below) or survivors[-1:]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a micro-batch; logs it with its parts against cumulative tokens."""
        result = self.step(batch["input_ids"])
        finite = torch.isfinite(result.loss.detach())
        self._finite = finite if self._finite is None else self._finite & finite
        self._by_layer = result.by_layer
        self._log(result)
        return result.loss

    def _log(self, result: StepResult) -> None:
        values = {"train/loss": result.loss.detach(), **{f"train/{name}": part for name, part in result.parts.items()}}
        rates = {f"lr/{group['name']}": float(group["lr"]) for group in self._optimizer().param_groups}
        # the key "step" is what loggers take for their own counter; Lightning's restarts when a run is resumed
        place = {"tokens": float(self.tokens), "stage": float(self.stage_number), "step": float(self.steps)}
        self.log_dict({**values, **rates, **place}, on_step=True, on_epoch=False)

    def alignment(self) -> list[str]:
        """A sentence on how far each layer was from the teacher's in the latest step; none in a stage without."""
        values, self._by_layer = self._by_layer, {}
        listed = ", ".join(f"{layer}: {float(value):.4g}" for layer, value in values.items())
        return [f"{self.stage.objective} by layer in the last step: {listed}"] if values else []

    def where(self) -> str:
        """The place of the step in progress, for messages."""
        return f"at {self.tokens} tokens, stage {self.stage_number} ({self.stage.name})"

    def _optimizer(self) -> torch.optim.Optimizer:
        return cast(Any, self.optimizers(use_pl_optimizer=False))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the rates of both groups."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr_scale * (self.stage.lr_new if group["name"] == "new" else self.stage.lr)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm over both groups together; skip the step when the loss or a gradient is not finite.

        Without gradients AdamW changes nothing, neither weights nor moments. All ranks skip when one has to: its loss
        may be infinite while the summed gradient is not.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = sharding.whole(torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters]))
        finite = torch.isfinite(norm) if self._finite is None else torch.isfinite(norm) & self._finite
        self._finite = None
        self.skipped, self.stopping = self.ranks.any(not finite, self.stop_wanted())
        if self.skipped:
            for parameter in parameters:
                parameter.grad = None
        elif self.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optim.clip, norm)
        self.log("train/grad_norm", norm, on_step=True, on_epoch=False)

    @torch.no_grad()
    def measure(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Quality on validation batches: ppl, nll, kl, top1, retention, teacher_ppl, and the student's tokens_per_s.

        The teacher's last hidden states are computed once per batch position and kept.
        """
        was_training = self.student.training
        self.student.eval()
        metrics, seconds = QualityMetrics().to(self.device), 0.0
        student, teacher = Stack(self.student), Stack(self.teacher)
        for index, batch in enumerate(batches):
            input_ids = batch["input_ids"].to(self.device)
            if index not in self._teacher_cache:
                self._teacher_cache[index] = teacher.last_hidden(input_ids)
            start = clock(self.device)
            hidden = student.last_hidden(input_ids)
            seconds += clock(self.device) - start
            labels = next_tokens(input_ids)
            metrics.update_from_hidden(
                hidden, student.head, self._teacher_cache[index], teacher.head, labels, softcap=student.softcap
            )
        self.student.train(was_training)
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        return {**metrics.compute(), "tokens_per_s": tokens / max(seconds, 1e-9)}


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
