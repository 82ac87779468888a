"""Metrics of torchmetrics for held-out text: perplexity, and agreement with the teacher token by token.

All metrics are ratios of sums over valid tokens (labels != -100), held in float64, so that they do not depend on
batch size, padding or chunking, and are correct over ranks when the sums are added. Agreement with the teacher
separates compressed models that equal perplexity hides (Accuracy is Not All You Need, arXiv 2407.09141).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from iskd.models import IGNORE, Head, at_least_fp32, autocast_head, cap_logits, project


class _TokenMean(Metric):
    """Sum over valid tokens divided by their number; nan before the first token."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, labels: Tensor) -> None:
        keep = labels != IGNORE
        self.total += values[keep].double().sum()
        self.tokens += keep.sum()

    def compute(self) -> Tensor:
        """Mean per token."""
        return self.total / self.tokens


class Perplexity(_TokenMean):
    """exp of the student's mean negative log-likelihood per token."""

    higher_is_better = False

    @torch.no_grad()
    def update(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> None:
        """Add tokens: logits [..., V], labels [...]; the teacher's logits are not read."""
        logits = at_least_fp32(student_logits).flatten(0, -2)
        values = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
        self._add(values.view_as(labels), labels)

    def compute(self) -> Tensor:
        """Perplexity."""
        return super().compute().exp()


class TokenKL(_TokenMean):
    """Mean forward divergence KL(teacher || student) in nats per token."""

    higher_is_better = False

    @torch.no_grad()
    def update(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> None:
        """Add tokens: logits [..., V] of both, labels [...].

        Raises:
            ValueError: No teacher logits.
        """
        teacher_logits = _required(self, teacher_logits)
        log_p = torch.log_softmax(at_least_fp32(teacher_logits), dim=-1)
        log_q = torch.log_softmax(at_least_fp32(student_logits), dim=-1)
        self._add((log_p.exp() * (log_p - log_q)).sum(-1), labels)


class Top1Agreement(_TokenMean):
    """Share of tokens at which student and teacher predict the same next token, in [0, 1]; nan where a logit is."""

    higher_is_better = True

    @torch.no_grad()
    def update(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> None:
        """Add tokens: logits [..., V] of both, labels [...].

        Raises:
            ValueError: No teacher logits.
        """
        teacher_logits = _required(self, teacher_logits)
        student, teacher = _preferred(student_logits), _preferred(teacher_logits)
        self._add(torch.where((student + teacher).isnan(), torch.nan, (student == teacher).double()), labels)


class Retention(Metric):
    """Student's next-token accuracy divided by the teacher's on the same tokens.

    1 = nothing lost; above 1 = the student is better. A ratio of sums: correct tokens of one over correct tokens of
    the other. nan when the teacher got no token right, as there is then nothing to retain, and where a logit of either
    is nan.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    student_correct: Tensor
    teacher_correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("student_correct", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("teacher_correct", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> None:
        """Add tokens: logits [..., V] of both, labels [...].

        Raises:
            ValueError: No teacher logits.
        """
        teacher_logits = _required(self, teacher_logits)
        for correct, logits in ((self.student_correct, student_logits), (self.teacher_correct, teacher_logits)):
            token = _preferred(logits)
            right = torch.where(token.isnan(), torch.nan, (token == labels).double())
            correct += right.masked_fill(labels == IGNORE, 0).sum()

    def compute(self) -> Tensor:
        """Retention, or nan if the teacher has no correct token."""
        ratio = self.student_correct / self.teacher_correct
        return torch.where(self.teacher_correct > 0, ratio, torch.nan)


class QualityMetrics(nn.Module):
    """All quality metrics, fed from hidden states one chunk of logits at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.ppl = Perplexity()
        self.teacher_ppl = Perplexity()
        self.kl = TokenKL()
        self.top1 = Top1Agreement()
        self.retention = Retention()

    @torch.no_grad()
    def update_from_hidden(
        self,
        student_hidden_BTD: Tensor,
        student_head: Head,
        teacher_hidden_BTD: Tensor,
        teacher_head: Head,
        labels_BT: Tensor,
        chunk: int = 512,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        """Add a batch without ever holding its whole logits.

        Args:
            student_hidden_BTD: The head's input.
            student_head: Weight [V, D] and bias [V] or None.
            teacher_hidden_BTD: The teacher head's input; its width may differ.
            teacher_head: Weight and bias of the teacher.
            labels_BT: Next-token ids, already shifted; -100 = ignored.
            chunk: Tokens per chunk.
            scale: Multiplies the logits of both models.
            softcap: Caps the logits of both models by tanh; None = no cap.

        Raises:
            ValueError: Shapes that do not belong together, or chunk < 1.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be >= 1 token, got {chunk}")
        for who, hidden in (("student", student_hidden_BTD), ("teacher", teacher_hidden_BTD)):
            if hidden.shape[:-1] != labels_BT.shape:
                raise ValueError(f"{who} hidden states {list(hidden.shape)} do not fit labels {list(labels_BT.shape)}")
        keep = labels_BT != IGNORE
        student_ND, teacher_ND, labels_N = student_hidden_BTD[keep], teacher_hidden_BTD[keep], labels_BT[keep]
        student_low, teacher_low = autocast_head(student_head), autocast_head(teacher_head)
        for start in range(0, len(labels_N), chunk):
            at = slice(start, start + chunk)
            student_nV = cap_logits(project(student_ND[at], student_low), scale=scale, softcap=softcap)
            teacher_nV = cap_logits(project(teacher_ND[at], teacher_low), scale=scale, softcap=softcap)
            self.update(student_nV, teacher_nV, labels_N[at])

    def update(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
        """Add tokens: logits [..., V] of both, labels [...]."""
        self.teacher_ppl.update(teacher_logits, None, labels)
        for metric in (self.ppl, self.kl, self.top1, self.retention):
            metric.update(student_logits, teacher_logits, labels)

    def compute(self) -> dict[str, float]:
        """All values over all ranks; call it on every rank, in any strategy.

        Returns:
            ppl, nll (nats per token), kl (nats per token), top1 and retention (ratios), teacher_ppl.
        """
        ppl = self.ppl.compute()
        values = {
            "ppl": ppl,
            "nll": ppl.log(),
            "kl": self.kl.compute(),
            "top1": self.top1.compute(),
            "retention": self.retention.compute(),
            "teacher_ppl": self.teacher_ppl.compute(),
        }
        return {name: value.item() for name, value in values.items()}

    def reset(self) -> None:
        """Forget all tokens, e.g. between two validations."""
        for metric in (self.ppl, self.teacher_ppl, self.kl, self.top1, self.retention):
            metric.reset()


def _preferred(logits: Tensor) -> Tensor:
    """Most likely token of each row [...], float64; nan where a logit is: argmax would name the place of the nan."""
    token = logits.argmax(-1, keepdim=True)
    return torch.where(logits.gather(-1, token).isnan(), torch.nan, token.double()).squeeze(-1)


def _required(metric: Metric, teacher_logits: Tensor | None) -> Tensor:
    if teacher_logits is None:
        raise ValueError(f"{type(metric).__name__} compares with the teacher; pass its logits, got None")
    return teacher_logits
