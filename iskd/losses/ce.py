"""Cross-entropy with the data's own next token: -log p_student(label), the loss of ordinary training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.models import IGNORE, Signals, at_least_fp32

_NO_LOGITS = "CrossEntropy needs logits: call it on a vocabulary chunk (chunked_vocabulary_loss)"


class CrossEntropy:
    """Label cross-entropy in nats per token; the teacher is not used.

    Source: maximum likelihood
    Needs: no teacher
    Costs: the student's logits, a chunk at a time
    Measured: the untouched model, trained on WikiText-2: perplexity of unseen text 20.55 to 15.57
        (experiments/iskd-smollm2/README.md)
    """

    needs: frozenset[str] = frozenset({"logits"})
    uses_teacher: bool = False

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Cross-entropy of the labels' shape, 0 at ignored labels.

        Raises:
            ValueError: The student's signals carry no logits.
        """
        if student.logits is None:
            raise ValueError(_NO_LOGITS)
        logits = at_least_fp32(student.logits).flatten(0, -2)
        values = F.cross_entropy(logits, student.labels.flatten(), ignore_index=IGNORE, reduction="none")
        return values.view_as(student.labels)

    def with_gradient(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """Values as of a call, and their slope [..., V]: softmax minus the label's unit vector, 0 at ignored labels."""
        if student.logits is None:
            raise ValueError(_NO_LOGITS)
        labels = student.labels.unsqueeze(-1)
        ignored, targets = labels == IGNORE, labels.clamp(min=0)
        log_q = torch.log_softmax(at_least_fp32(student.logits), dim=-1)
        values = -log_q.gather(-1, targets).masked_fill_(ignored, 0).squeeze(-1)
        slope = log_q.exp_()
        slope.scatter_add_(-1, targets, -torch.ones_like(targets, dtype=slope.dtype))
        if slope.device.type == "cpu" and not ignored.any():  # elsewhere the question costs more than the pass
            return values, slope
        return values, slope.masked_fill_(ignored, 0)
