"""One pass of a student and its teacher over windows, measured by the metrics of `iskd.evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from transformers import PreTrainedModel

from iskd.evaluation.bootstrap import interval, resampled_means
from iskd.evaluation.metrics import QualityMetrics
from iskd.models import Stack
from iskd.models.packing import within
from iskd.models.signals import next_tokens
from iskd.system.machine import clock

_RESAMPLES = 1000


class Remembered(Protocol):
    """Tensors by number, of which the first are there: a dictionary, or what keeps them elsewhere."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Tensor: ...
    def __setitem__(self, index: int, value: Tensor) -> None: ...


@torch.no_grad()
def measure_quality(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    remembered: Remembered | None = None,
    *,
    intervals: bool = False,
) -> dict[str, float]:
    """Measure a student beside its teacher; its training mode is afterwards what it was.

    Args:
        student: the model that is measured, on any device.
        teacher: the original, on the same one.
        batches: windows as `input_ids` [B, T], and which of their tokens count as `targets` [B, T] where not all do.
        remembered: the teacher's last hidden states [B, T, D] by number of the batch; what is missing is computed and
            added. To be handed in again with the same batches only. None = nothing is known or kept.
        intervals: also how sure ppl, kl, top1 and retention are.

    Returns:
        ppl, nll (nats per token), kl (nats per token), top1, retention, teacher_ppl, and the student's tokens_per_s.
        With `intervals` and two windows or more also `ppl_low`, `ppl_high` and so on: bounds of 95 % by the bootstrap
        over windows, the same at every call.
    """
    was_training = student.training
    student.eval()
    ours, theirs = Stack(student), Stack(teacher)
    device = student.device
    metrics, sums, seconds = QualityMetrics().to(device), _WindowSums().to(device), 0.0
    known: Remembered = {} if remembered is None else remembered
    for index, batch in enumerate(batches):
        input_ids = batch["input_ids"].to(device)
        expected = known[index] if index < len(known) else theirs.last_hidden(input_ids)
        if remembered is not None:
            remembered[index] = expected
        start = clock(device)
        hidden = ours.last_hidden(input_ids)
        seconds += clock(device) - start
        targets = batch["targets"].to(device) if "targets" in batch else None
        labels = within(next_tokens(input_ids, targets), input_ids, ours.separator)
        for at in [slice(row, row + 1) for row in range(len(labels))] if intervals else [slice(None)]:
            metrics.update_from_hidden(
                hidden[at], ours.head, expected[at], theirs.head, labels[at], softcap=ours.softcap
            )
            if intervals:
                sums.update(metrics)
    student.train(was_training)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    bounds = _bounds(sums.compute()) if intervals else {}
    return {**metrics.compute(), **bounds, "tokens_per_s": tokens / max(seconds, 1e-9)}


class _WindowSums(Metric):
    """What every window adds to the sums of the metrics, over all ranks."""

    full_state_update = False
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")
        self._before: Tensor | None = None

    def update(self, metrics: QualityMetrics) -> None:
        """Add a window, the last one that the metrics saw."""
        kept = metrics.retention
        held = (metrics.ppl.total, metrics.kl.total, metrics.top1.total, metrics.ppl.tokens)
        now = torch.stack([*held, kept.student_correct, kept.teacher_correct])
        self.rows.append((now if self._before is None else now - self._before)[None])
        self._before = now

    def compute(self) -> Tensor:
        """Sums [windows, 6]: nats of the student, of the KL, agreements, tokens, both models' right tokens."""
        return dim_zero_cat(self.rows).cpu()


def _bounds(sums_W6: Tensor) -> dict[str, float]:
    """Bounds of the metrics, which are ratios of sums, by drawing windows; empty for fewer than two.

    Of one that is not finite in every draw (a retention where the teacher may be right nowhere) there are none.
    """
    if len(sums_W6) < 2:
        return {}
    nats, kl, agreed, tokens, ours, theirs = resampled_means(sums_W6, _RESAMPLES, seed=0).unbind(1)
    drawn = {"ppl": (nats / tokens).exp(), "kl": kl / tokens, "top1": agreed / tokens, "retention": ours / theirs}
    found: dict[str, float] = {}
    for name, values in drawn.items():
        if values.isfinite().all():
            low, high = interval(values).tolist()
            found |= {f"{name}_low": low, f"{name}_high": high}
    return found
