"""Divergence between the next-token distributions of teacher P and student Q, both softened by a temperature.

    forward   KL(P || Q) = sum_v P log(P / Q)                       mode covering; Hinton et al., arXiv 1503.02531
    reverse   KL(Q || P)                                            mode seeking; MiniLLM, arXiv 2306.08543
    jsd       beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q      GKD, arXiv 2306.13649, sec. 2

All are multiplied by temperature^2, which keeps the size of the gradient when the temperature changes (1503.02531,
section 2). The generalised JSD of GKD is bounded and tends to beta * forward as beta -> 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iskd.models import Signals, at_least_fp32

DIRECTIONS = ("forward", "reverse", "jsd")


class KL:
    """Per-token divergence to the teacher in nats, summed over the vocabulary.

    Args:
        direction: "forward" = KL(teacher || student), "reverse" = KL(student || teacher), or "jsd".
        temperature: Divides both logits; > 0.
        beta: Share of the teacher in the mixture of "jsd"; in (0, 1), 0.5 is the symmetric divergence.

    Raises:
        ValueError: Unknown direction, temperature not positive, or beta outside (0, 1).

    What for kl: KL(teacher || student) per token in nats, mode covering
    What for reverse_kl: KL(student || teacher) per token in nats, mode seeking
    What for jsd: generalised Jensen-Shannon divergence per token in nats, bounded
    Source for kl: Hinton et al. (arXiv 1503.02531)
    Source for reverse_kl: MiniLLM (arXiv 2306.08543)
    Source for jsd: GKD (arXiv 2306.13649, section 2)
    Needs: the teacher's logits, live or from `teacher.cache`
    Costs: both models' logits, a chunk at a time
    Costs for kl: both models' logits, a chunk at a time: 7.8 times less memory than whole ones in chunks of 512
        (benchmarks/README.md)
    Measured for kl: heals to KL 0.73, 30 % of the block parameters out (experiments/iskd-smollm2/README.md); ShortGPT
        at 23 layers of 30 to KL 0.53 (experiments/ild-smollm2/README.md)
    Measured: not measured
    """

    needs: frozenset[str] = frozenset({"logits"})
    uses_teacher: bool = True
    by_buckets: bool = True

    def __init__(self, direction: str = "forward", temperature: float = 1.0, beta: float = 0.5) -> None:
        if direction not in DIRECTIONS:
            raise ValueError(f"KL direction must be one of {list(DIRECTIONS)}, got {direction!r}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"KL temperature must be > 0, got {temperature}")
        if not 0 < beta < 1:
            raise ValueError(f"KL beta must be in (0, 1), got {beta}; for the ends use direction=forward or reverse")
        self.direction = direction
        self.temperature = temperature
        self.beta = beta

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Divergence of the labels' shape; no gradient reaches the teacher.

        Raises:
            ValueError: Logits are missing, or the two vocabularies differ in size.
        """
        return self._divergence(*self._log_probabilities(student, teacher)) * self.temperature**2

    def with_gradient(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """Values as of a call, and their slope with respect to the student's logits s, [..., V].

        With q_v = softmax(s / temperature)_v and <x> = sum_v q_v x_v, in units of the temperature:

            forward   q - p
            reverse   q (log q/p - <log q/p>)
            jsd       (1 - beta) q (log q/m - <log q/m>)
        """
        tau = self.temperature
        if self.direction == "forward":
            return self._forward_with_gradient(student, teacher)
        log_p, log_q = self._log_probabilities(student, teacher)
        values, q = self._divergence(log_p, log_q), log_q.exp()
        other = log_p if self.direction == "reverse" else self._log_mixture(log_p, log_q)
        ratio = log_q.sub_(other)
        factor = tau if self.direction == "reverse" else tau * (1 - self.beta)
        ratio.sub_((q * ratio).sum(-1, keepdim=True))
        return values.mul_(tau**2), q.mul_(ratio).mul_(factor)

    def _forward_with_gradient(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """The same, with two exponentials per entry instead of four.

        Of logits t and s that are 0 at their greatest, KL = sum_v p (t - s) + log max p - log max q.
        """
        t, s = self._softened(student, teacher)
        p, q = torch.softmax(t, dim=-1), torch.softmax(s, dim=-1)
        # differences first: of large logits that are nearly the same, all digits stay
        difference = (t - s).sub_(t.amax(-1, keepdim=True) - s.amax(-1, keepdim=True))
        values = difference.mul_(p).sum(-1).add_(p.amax(-1).log()).sub_(q.amax(-1).log())
        return values.mul_(self.temperature**2), q.sub_(p).mul_(self.temperature)

    def _log_probabilities(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """Teacher's and student's at the temperature, in tensors of their own, after the checks."""
        t, s = self._softened(student, teacher)
        return torch.log_softmax(t, dim=-1), torch.log_softmax(s, dim=-1)

    def _softened(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """Teacher's and student's logits in units of the temperature, in at least float32, after the checks."""
        if student.logits is None or teacher.logits is None:
            raise ValueError("KL needs logits of student and teacher: call it on a vocabulary chunk")
        if student.logits.shape != teacher.logits.shape:
            raise ValueError(
                f"KL needs one vocabulary: student logits {list(student.logits.shape)}, "
                f"teacher logits {list(teacher.logits.shape)}"
            )
        t, s = at_least_fp32(teacher.logits.detach()), at_least_fp32(student.logits)
        return (t, s) if self.temperature == 1 else (t / self.temperature, s / self.temperature)

    def _divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.direction == "forward":
            return _kl(log_p, log_q)
        if self.direction == "reverse":
            return _kl(log_q, log_p)
        log_m = self._log_mixture(log_p, log_q)
        return self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)

    def _log_mixture(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)
