"""The central reducer: add up loss terms without ever holding logits for a whole batch.

Logits [B, T, V] and their gradient are the largest tensors of distillation. Ignored tokens are dropped first; the
other N are walked in chunks, and the gradient of the weighted sum

    L = sum_k weight_k * mean_N loss_k(logits_n, teacher_logits_n)

with respect to the hidden states and the head is formed during the forward pass, chunk by chunk, so that one chunk of
logits is alive at a time. The backward pass only multiplies by the incoming scalar; first order only. The idea is
that of fused linear cross-entropy (Liger Kernel, arXiv 2410.10989, section 3), here in plain PyTorch and for any
per-token term. `naive_vocabulary_loss` is the obvious reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from iskd.losses.base import (
    Head,
    Terms,
    autocast_head,
    check_batch,
    check_terms,
    finish_logits,
    masked_mean,
    project,
    token_values,
    uses_teacher,
    valid_tokens,
)
from iskd.signals import Signals

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def total_loss(
    terms: Terms,
    student: Signals,
    teacher: Signals | None,
    student_head: Head,
    teacher_head: Head | None,
    *,
    chunk: int = 256,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of all terms: those on logits in chunks, the others on the whole signals.

    Args:
        terms: Loss and weight by name; a term of weight 0 is switched off, i.e. neither computed nor reported.
        student: Signals of a batch; `last_hidden` is read if a term needs logits.
        teacher: The same for the teacher; None if no term uses it.
        student_head: Weight [V, D] and bias [V] or None.
        teacher_head: The same for the teacher; None if no term on logits uses it.
        chunk: Tokens per chunk of logits.
        scale: Multiplies the logits of both models.
        softcap: Caps the logits of both models by tanh; None = no cap.

    Returns:
        The scalar total with its gradient, and the unweighted, detached mean of every term by name.

    Raises:
        ValueError: Bad terms (see `check_terms`), a missing signal, or no valid label.
    """
    check_terms(terms)
    terms = {name: (loss, weight) for name, (loss, weight) in terms.items() if weight > 0}
    if not terms:
        raise ValueError("every loss weight is 0: nothing would train; give at least one term a weight > 0")
    readers = [name for name, (loss, _) in terms.items() if uses_teacher(loss)]
    if readers and teacher is None:
        raise ValueError(f"loss terms {readers} use the teacher; pass its signals")
    means: dict[str, Tensor] = {}
    totals: list[Tensor] = []
    on_logits = {name: term for name, term in terms.items() if "logits" in term[0].needs}
    if on_logits:
        if student.last_hidden is None:
            raise ValueError(f"loss terms {list(on_logits)} need logits, but the student's signals have no last_hidden")
        total, parts = chunked_vocabulary_loss(
            on_logits, student.last_hidden, student_head, teacher.last_hidden if teacher else None, teacher_head,
            student.labels, chunk=chunk, scale=scale, softcap=softcap,
        )  # fmt: skip
        means.update(parts)
        totals.append(total)
    for name, (loss, weight) in terms.items():
        if name not in on_logits:
            values = token_values(name, loss, student, teacher or Signals(student.labels))
            mean = masked_mean(values, student.labels)
            means[name] = mean.detach()
            totals.append(weight * mean)
    return torch.stack(totals).sum(), {name: means[name] for name in terms}


def chunked_vocabulary_loss(
    terms: Terms,
    student_hidden_BTD: Tensor,
    student_head: Head,
    teacher_hidden_BTD: Tensor | None,
    teacher_head: Head | None,
    labels_BT: Tensor,
    *,
    chunk: int = 256,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of terms on logits, one chunk of logits at a time.

    Under an active autocast the matmuls with the heads run in its dtype; terms see logits in at least float32. The
    head's gradient is accumulated in at least float32, and skipped when its weight does not require one.

    Args:
        terms: Loss and weight by name; every loss needs logits only.
        student_hidden_BTD: The head's input.
        student_head: Weight [V, D] and bias [V] or None.
        teacher_hidden_BTD: The teacher head's input (its width may differ); None if no term uses the teacher.
        teacher_head: Weight and bias of the teacher; no gradient reaches it.
        labels_BT: Next-token ids; -100 = ignored.
        chunk: Tokens per chunk.
        scale: Multiplies the logits of both models.
        softcap: Caps the logits of both models by tanh; None = no cap.

    Returns:
        The scalar total with its gradient, and the unweighted, detached mean of every term over the valid tokens.

    Raises:
        ValueError: Bad terms, shapes that do not belong together, chunk < 1, no teacher, or no valid label.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1 token, got {chunk}")
    check_batch(terms, student_hidden_BTD, teacher_hidden_BTD, teacher_head, labels_BT)
    take = valid_tokens(labels_BT)
    teacher_ND: Tensor | None = None
    if teacher_hidden_BTD is not None and any(uses_teacher(loss) for loss, _ in terms.values()):
        teacher_ND = take(teacher_hidden_BTD.detach())
    frozen_head = None if teacher_head is None else autocast_head(teacher_head)
    tokens = _Tokens(terms, take(labels_BT), teacher_ND, frozen_head, chunk, scale, softcap)
    student_ND, (weight_VD, bias_V) = take(student_hidden_BTD), student_head
    inputs = (student_ND, weight_VD, bias_V)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        total, means_K = _ChunkedMean.apply(tokens, *inputs)  # type: ignore[no-untyped-call]
    else:
        total, means_K, _ = _walk(tokens, *inputs, wants=(False, False, False))
    return total, dict(zip(terms, means_K.unbind(), strict=True))


def naive_vocabulary_loss(
    terms: Terms,
    student_hidden_BTD: Tensor,
    student_head: Head,
    teacher_hidden_BTD: Tensor | None,
    teacher_head: Head | None,
    labels_BT: Tensor,
    *,
    chunk: int = 256,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reference for `chunked_vocabulary_loss`: whole logits [B, T, V] and plain autograd; `chunk` has no effect."""
    check_batch(terms, student_hidden_BTD, teacher_hidden_BTD, teacher_head, labels_BT)
    student = Signals(
        labels_BT, finish_logits(F.linear(student_hidden_BTD, *student_head), scale=scale, softcap=softcap)
    )
    teacher = Signals(labels_BT)
    if teacher_hidden_BTD is not None and teacher_head is not None:
        with torch.no_grad():
            teacher.logits = finish_logits(F.linear(teacher_hidden_BTD, *teacher_head), scale=scale, softcap=softcap)
    means = {
        name: masked_mean(token_values(name, loss, student, teacher), labels_BT) for name, (loss, _) in terms.items()
    }
    total = torch.stack([terms[name][1] * mean for name, mean in means.items()]).sum()
    return total, {name: mean.detach() for name, mean in means.items()}


@dataclass(frozen=True)
class _Tokens:
    """The valid tokens of a batch and everything but the student that their terms depend on."""

    terms: Terms
    labels_N: Tensor
    teacher_ND: Tensor | None
    teacher_head: Head | None
    chunk: int
    scale: float
    softcap: float | None

    def sums(self, student_nV: Tensor, at: slice) -> Tensor:
        """Sum of every term over one chunk, [K], from the student's projections before scale and cap."""
        student = Signals(self.labels_N[at], finish_logits(student_nV, scale=self.scale, softcap=self.softcap))
        teacher = Signals(self.labels_N[at])
        if self.teacher_ND is not None and self.teacher_head is not None:
            with torch.no_grad():
                teacher_nV = project(self.teacher_ND[at], self.teacher_head)
                teacher.logits = finish_logits(teacher_nV, scale=self.scale, softcap=self.softcap)
        return torch.stack([token_values(name, loss, student, teacher).sum() for name, (loss, _) in self.terms.items()])


class _ChunkedMean(torch.autograd.Function):
    """Differentiable shell of `_walk`: keeps the finished gradients, not the graph that made them."""

    @staticmethod
    def forward(ctx: Any, tokens: _Tokens, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Any:
        total, means_K, gradients = _walk(tokens, hidden_ND, weight_VD, bias_V, wants=ctx.needs_input_grad[1:])
        ctx.save_for_backward(*gradients)
        ctx.tokens = len(tokens.labels_N)
        ctx.mark_non_differentiable(means_K)
        return total, means_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> Any:
        # The division by N comes last: gradients of a mean over many tokens would underflow in fp16 matmuls.
        factor = grad_total / ctx.tokens
        return None, *(None if gradient is None else gradient * factor for gradient in ctx.saved_tensors)


@torch.no_grad()
def _walk(
    tokens: _Tokens, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *, wants: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Gradients]:
    """Total, means [K], and the gradients of N * total for those inputs that want one."""
    head = autocast_head((weight_VD, bias_V))
    sink = _Sink(hidden_ND, weight_VD, bias_V, wants)
    weights = [weight for _, weight in tokens.terms.values()]
    chunks: list[Tensor] = []
    for start in range(0, len(hidden_ND), tokens.chunk):
        at = slice(start, start + tokens.chunk)
        h_nD = hidden_ND[at].to(head[0].dtype)
        logits_nV = project(h_nD, head).requires_grad_(any(wants))
        with torch.set_grad_enabled(any(wants)):
            sums_K = tokens.sums(logits_nV, at)
            weighted = _weighted(weights, sums_K)
        if any(wants):
            (grad_nV,) = torch.autograd.grad(weighted, logits_nV)
            sink.add(grad_nV, h_nD, head[0], at)
        chunks.append(sums_K.detach())
    means_K = torch.stack(chunks).sum(0) / len(hidden_ND)
    return _weighted(weights, means_K), means_K, sink.gradients(weight_VD.dtype)


class _Sink:
    """Gradient buffers of the linear map logits = hidden @ weight.T + bias, reused by every chunk."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wants: tuple[bool, bool, bool]
    ) -> None:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        self.hidden_ND = torch.empty_like(hidden_ND) if wants[0] else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and wants[2] else None

    def add(self, grad_nV: Tensor, h_nD: Tensor, weight_VD: Tensor, at: slice) -> None:
        """Backward of one chunk; matmuls in the dtype of the forward one, sums in that of the buffers."""
        if self.bias_V is not None:
            self.bias_V += grad_nV.sum(0)
        low_nV = grad_nV.to(weight_VD.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[at] = low_nV @ weight_VD
        if self.weight_VD is None:
            return
        if self.weight_VD.dtype == low_nV.dtype:
            self.weight_VD.addmm_(low_nV.T, h_nD)
        else:
            self.weight_VD += low_nV.T @ h_nD

    def gradients(self, head_dtype: torch.dtype) -> Gradients:
        """The buffers, those of the head in the head's own dtype."""
        weight_VD, bias_V = (None if x is None else x.to(head_dtype) for x in (self.weight_VD, self.bias_V))
        return self.hidden_ND, weight_VD, bias_V


def _weighted(weights: list[float], values_K: Tensor) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(weights, values_K.unbind(), strict=True)]).sum()
