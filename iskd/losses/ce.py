"""Cross-entropy with the data's own next token: -log p_student(label), the loss of ordinary training."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from iskd.losses.base import at_least_fp32
from iskd.signals import IGNORE, Signals


class CrossEntropy:
    """Label cross-entropy in nats per token; the teacher is not used."""

    needs: frozenset[str] = frozenset({"logits"})
    uses_teacher: bool = False

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Cross-entropy of the labels' shape, 0 at ignored labels.

        Raises:
            ValueError: The student's signals carry no logits.
        """
        if student.logits is None:
            raise ValueError("CrossEntropy needs logits: call it on a vocabulary chunk (chunked_vocabulary_loss)")
        logits = at_least_fp32(student.logits).flatten(0, -2)
        values = F.cross_entropy(logits, student.labels.flatten(), ignore_index=IGNORE, reduction="none")
        return values.view_as(student.labels)

    def with_gradient(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """Values as of a call, and their slope [..., V]: softmax minus the label's unit vector, 0 at ignored labels."""
        values, labels = self(student, teacher), student.labels.unsqueeze(-1)
        assert student.logits is not None
        slope = at_least_fp32(student.logits).softmax(-1)
        kept = labels != IGNORE
        slope.scatter_add_(-1, labels.clamp(min=0), -kept.to(slope.dtype))
        return values, slope if kept.all() else slope.mul_(kept)
