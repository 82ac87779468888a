"""Divergences to a teacher of which only the k likeliest tokens are known, and the mass of all others together.

The k tokens and one bucket for the rest are a distribution of k + 1 outcomes. The student's is merged the same way:

    P = (p_1, ..., p_k, p_rest)      Q = (q_1, ..., q_k, q_rest)      q_rest = sum of q over the other V - k tokens
    value = D(P, Q),  D any of the divergences between next-token distributions (`iskd.losses.kl`)

Bias: merging outcomes never raises a divergence (log sum inequality; Cover & Thomas, Elements of Information Theory,
theorem 2.7.1), so the value is at most the dense one; what is missing is how the two differ inside the rest.
Inside it the student is not told which token should have how much: the slope there is (q_rest - p_rest) q_v / q_rest
for the forward direction, which moves the rest as a whole. Without the bucket the student would not learn how much to
leave to the rest at all, and top-k values scaled up to 1 make it overconfident (Sparse Logit Sampling, arXiv
2503.16870). A temperature other than 1 would need the rest token by token and is refused (`iskd.teacher.cache_rows`).

The reducers of `iskd.losses.chunked` are used as they are: labels are replaced by row numbers, by which every term
finds its labels and its row of the teacher's table again, whichever tokens a chunk holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iskd.losses.base import Loss, Terms, kept_tokens, knows_its_slope, traits_of
from iskd.losses.chunk_size import Chunk
from iskd.losses.chunked import total_loss
from iskd.models import IGNORE, Head, Signals, at_least_fp32


@dataclass(frozen=True)
class TopK:
    """The teacher's likeliest tokens.

    Attributes:
        ids: [B, T, K] int64, no id twice.
        log_probs: [B, T, K + 1], natural logarithms of their probabilities, and of the rest's at the end.
    """

    ids: Tensor
    log_probs: Tensor


def topk_loss(
    terms: Terms, student: Signals, teacher: TopK, head: Head, *, chunk: Chunk = 256, softcap: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of all terms, those that use the teacher on k + 1 outcomes per token.

    Args:
        terms: loss and weight by name; a term on logits that uses the teacher must be a divergence of distributions.
        student: signals of a batch, whole ones.
        teacher: its tokens and their log-probabilities for the same windows.
        head: the student's weight [V, D] and bias [V] or None.
        chunk: tokens per chunk of logits, "auto" or None, as in `iskd.losses.chunked.total_loss`.
        softcap: caps the student's logits by tanh; the teacher's were capped when they were stored.

    Returns:
        The scalar total with its gradient, and the unweighted, detached mean of every term by name.
    """
    table = _Table(student.labels.flatten(), teacher.ids.flatten(0, 1), teacher.log_probs.flatten(0, 1))
    numbers = torch.arange(len(table.labels), device=table.labels.device)
    rows = numbers.masked_fill(table.labels == IGNORE, IGNORE).view_as(student.labels)
    at_rows: Terms = {name: (_at_rows(loss, table), weight) for name, (loss, weight) in terms.items()}
    kept, numbered = kept_tokens(student), replace(student, labels=rows)
    return total_loss(at_rows, numbered, None, head, None, chunk=chunk, softcap=softcap, kept=kept)


def in_buckets(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens `ids` [..., K] and of the rest, [..., K + 1], and those within the rest.

    The second [..., V] is the distribution of the tokens of the rest among themselves; -inf at `ids`.
    """
    wide = at_least_fp32(logits)
    others = wide.scatter(-1, ids, float("-inf"))
    log_rest = others.logsumexp(-1, keepdim=True)
    return torch.log_softmax(torch.cat([wide.gather(-1, ids), log_rest], -1), -1), others - log_rest


@dataclass(frozen=True)
class _Table:
    """What belongs to each token of a batch: its label [N], the teacher's tokens [N, K] and log-probabilities."""

    labels: Tensor
    ids: Tensor
    log_probs: Tensor

    def labels_at(self, rows: Tensor) -> Tensor:
        return self.labels[rows.clamp(min=0)].masked_fill(rows == IGNORE, IGNORE)

    def ids_at(self, rows: Tensor) -> Tensor:
        """What stands at ignored rows, which only whole logits have, counts in no mean."""
        return self.ids[rows.clamp(min=0)]

    def log_probs_at(self, rows: Tensor) -> Tensor:
        return at_least_fp32(self.log_probs[rows.clamp(min=0)])


class _AtRows:
    """A term that does not use the teacher, given row numbers for labels."""

    uses_teacher = False

    def __init__(self, loss: Loss, table: _Table) -> None:
        self.loss, self.table, self.needs = loss, table, loss.needs

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        return self.loss(*self.seen(student, teacher))

    def seen(self, student: Signals, teacher: Signals) -> tuple[Signals, Signals]:
        return replace(student, labels=self.table.labels_at(student.labels)), teacher


class _InBuckets(_AtRows):
    """A divergence, given both distributions in buckets."""

    def seen(self, student: Signals, teacher: Signals) -> tuple[Signals, Signals]:
        assert student.logits is not None
        rows = student.labels
        return self.signals(rows, in_buckets(student.logits, self.table.ids_at(rows))[0])

    def signals(self, rows: Tensor, log_q: Tensor) -> tuple[Signals, Signals]:
        """Log-probabilities are logits: the softmax of them is what they are the logarithms of."""
        labels = self.table.labels_at(rows)
        return Signals(labels, log_q), Signals(labels, self.table.log_probs_at(rows))


class _AtRowsWithSlope(_AtRows):
    """The same of a term that knows its own slope."""

    def with_gradient(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        loss: Any = self.loss
        return loss.with_gradient(*self.seen(student, teacher))


class _InBucketsWithSlope(_InBuckets):
    """The same of a divergence that knows its own slope."""

    def with_gradient(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """The slope of a bucket goes to its tokens by their share in it.

        A slope through a softmax adds up to 0 over the outcomes, hence nothing is left of the normaliser.
        """
        assert student.logits is not None
        loss: Any = self.loss
        rows = student.labels
        ids = self.table.ids_at(rows)
        log_q, within = in_buckets(student.logits, ids)
        values, slope = loss.with_gradient(*self.signals(rows, log_q))
        within.exp_().mul_(slope[..., -1:]).scatter_(-1, ids, slope[..., :-1])
        return values, within


def _at_rows(loss: Loss, table: _Table) -> Loss:
    known = knows_its_slope(loss)
    if "logits" in loss.needs and traits_of(loss).uses_teacher:
        return _InBucketsWithSlope(loss, table) if known else _InBuckets(loss, table)
    return _AtRowsWithSlope(loss, table) if known else _AtRows(loss, table)
