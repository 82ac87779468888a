"""One pass of a student and its teacher over windows, measured by the metrics of `iskd.evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.evaluation.metrics import QualityMetrics
from iskd.models import Stack
from iskd.models.packing import within
from iskd.models.signals import next_tokens
from iskd.system.machine import clock


@torch.no_grad()
def measure_quality(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    remembered: dict[int, Tensor] | None = None,
) -> dict[str, float]:
    """Measure a student beside its teacher; its training mode is afterwards what it was.

    Args:
        student: the model that is measured, on any device.
        teacher: the original, on the same one.
        batches: windows as `input_ids` [B, T], and which of their tokens count as `targets` [B, T] where not all do.
        remembered: the teacher's last hidden states [B, T, D] by number of the batch; what is missing is computed and
            added. To be handed in again with the same batches only. None = nothing is known or kept.

    Returns:
        ppl, nll (nats per token), kl (nats per token), top1, retention, teacher_ppl, and the student's tokens_per_s.
    """
    was_training = student.training
    student.eval()
    ours, theirs = Stack(student), Stack(teacher)
    device = student.device
    metrics, seconds = QualityMetrics().to(device), 0.0
    known = {} if remembered is None else remembered
    for index, batch in enumerate(batches):
        input_ids = batch["input_ids"].to(device)
        expected = known[index] if index in known else theirs.last_hidden(input_ids)
        if remembered is not None:
            remembered[index] = expected
        start = clock(device)
        hidden = ours.last_hidden(input_ids)
        seconds += clock(device) - start
        targets = batch["targets"].to(device) if "targets" in batch else None
        labels = within(next_tokens(input_ids, targets), input_ids, ours.separator)
        metrics.update_from_hidden(hidden, ours.head, expected, theirs.head, labels, softcap=ours.softcap)
    student.train(was_training)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return {**metrics.compute(), "tokens_per_s": tokens / max(seconds, 1e-9)}
