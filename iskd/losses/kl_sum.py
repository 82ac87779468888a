"""Summed KL and final-state MSE: the losses of ILD as its authors' code has them (arXiv 2511.05085), in our units.

Published, for a micro-batch of `batch_size` documents, each padded to `seq_len` tokens (2 and 2048 in the scripts):

    1/divisor * sum_b sum_t KL(P_bt || Q_bt) + MSE(state before the gap) + MSE(state after the final norm)

with `divisor` 100 and temperature 1. Micro-batches and processes are averaged, so only the micro-batch counts. Terms
here are values per token that are averaged over N valid tokens, hence the published sum is that mean times

    batch_size * seq_len / divisor = 40.96

and the gradients are the published ones where no position is padding. The factor follows the length of a window
(conf/loss/kl_sum.yaml) and not the batch: a sum over that would weigh the KL against the other terms by whatever fits
into memory. Two things differ. Published,
padding is scored like text, in all three terms, and pulls the student towards the teacher on pad tokens; windows here
are packed, and ignored labels count in no term. The last position of a window has no label and is left out as well,
one of 2048. The hidden term before the gap is `iskd.losses.hidden.HiddenMatch(layers="edited")`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.models import Signals, at_least_fp32


class SummedKL:
    """KL(teacher || student) in nats per token, times the constant that makes its mean the published sum.

    Args:
        batch_size: Documents per micro-batch and process over which the published loss is summed.
        seq_len: Tokens per document, padding included.
        divisor: What the sum is divided by.

    Raises:
        ValueError: A number that is not positive.

    Source: the code of ILD (arXiv 2511.05085)
    Needs: the teacher's logits
    Costs: both models' logits, a chunk at a time
    Measured: not measured
    """

    needs: frozenset[str] = frozenset({"logits"})
    uses_teacher: bool = True
    by_buckets: bool = True

    def __init__(self, batch_size: int = 2, seq_len: int = 2048, divisor: float = 100.0) -> None:
        if batch_size < 1 or seq_len < 1 or not (math.isfinite(divisor) and divisor > 0):
            raise ValueError(
                f"SummedKL needs batch_size, seq_len >= 1 and divisor > 0, got {batch_size}, {seq_len} and {divisor}"
            )
        self.factor = batch_size * seq_len / divisor

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Scaled divergence of the labels' shape; no gradient reaches the teacher.

        Raises:
            ValueError: Logits are missing, or the two vocabularies differ in size.
        """
        log_p, log_q = _log_probabilities(student, teacher)
        return self.factor * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    def with_gradient(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """Values as of a call, and their slope with respect to the student's logits, factor * (q - p), [..., V]."""
        log_p, log_q = _log_probabilities(student, teacher)
        p = log_p.exp()
        values = (p * log_p.sub_(log_q)).sum(-1)
        return values.mul_(self.factor), log_q.exp_().sub_(p).mul_(self.factor)


def _log_probabilities(student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
    """Teacher's and student's, in tensors of their own, after the checks."""
    if student.logits is None or teacher.logits is None:
        raise ValueError("SummedKL needs logits of student and teacher: call it on a vocabulary chunk")
    if student.logits.shape != teacher.logits.shape:
        raise ValueError(
            f"SummedKL needs one vocabulary: student logits {list(student.logits.shape)}, "
            f"teacher logits {list(teacher.logits.shape)}"
        )
    log_p = torch.log_softmax(at_least_fp32(teacher.logits.detach()), dim=-1)
    return log_p, torch.log_softmax(at_least_fp32(student.logits), dim=-1)


class FinalState:
    """Mean square distance of the states after the final norm, the published target at the top of the stack."""

    # the input of the head is always there: nothing has to be captured for it
    needs: frozenset[str] = frozenset()
    uses_teacher: bool = True
    sizes: str = "normed"

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Distance of the labels' shape, mean over the width; no gradient reaches the teacher.

        Raises:
            ValueError: A last hidden state is missing, or the widths differ.
        """
        if student.last_hidden is None or teacher.last_hidden is None:
            raise ValueError("FinalState needs last_hidden of student and teacher")
        s_BTD, t_BTD = at_least_fp32(student.last_hidden), at_least_fp32(teacher.last_hidden.detach())
        if s_BTD.shape != t_BTD.shape:
            raise ValueError(f"FinalState needs equal shapes: student {list(s_BTD.shape)}, teacher {list(t_BTD.shape)}")
        # of the states as hosts hand them out: student and teacher are of one family
        return (student.divisor * (s_BTD - t_BTD)).square().mean(-1)
