"""The walk over a batch in chunks: tokens through the heads, rows of their logits through the terms.

A chunk of tokens is what the two matmuls with a head want: many rows, or the head's gradient, as large as the head, is
added to too often. The element-wise work between them wants few rows, so few that they stay in the processor's cache:
every pass over 512 x 49k logits would otherwise go through memory. So the logits of a chunk are kept in the heads' own
precision, and a block of rows after the other is widened to at least float32, put through all terms and replaced, in
place, by its gradient. The logits of all chunks lie in the same memory (`iskd.losses.scratch`), hence a term may keep
none of what it is given.

A term that knows its own slope (`with_gradient`) is read off in closed form; one autograd graph per chunk serves any
other. Both give what `iskd.losses.chunked.naive_vocabulary_loss` gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from iskd.losses.base import Terms, knows_its_slope, token_values, values_and_slope
from iskd.losses.scratch import scratch
from iskd.models import Head, Signals, at_least_fp32, autocast_head, cap_logits
from iskd.models.head import cap_slope

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# numbers in a block of rows on a CPU: a handful of float32 tensors of this size fit into a second-level cache
_ROWS = 1 << 18


@dataclass(frozen=True)
class Tokens:
    """The valid tokens of a batch and everything but the student that their terms depend on."""

    terms: Terms
    labels_N: Tensor
    teacher_ND: Tensor | None
    teacher_head: Head | None
    chunk: int  # tokens whose logits exist at a time
    scale: float
    softcap: float | None

    def teacher_logits(self, at: slice) -> Tensor | None:
        """The teacher's projections [n, V] of a chunk before scale and cap, in its head's dtype."""
        if self.teacher_ND is None or self.teacher_head is None:
            return None
        return _project("teacher", self.teacher_ND[at], self.teacher_head)

    def signals(self, raw_nV: Tensor | None, at: slice) -> Signals:
        """What terms see of some tokens: labels and logits, scaled and capped."""
        if raw_nV is None:
            return Signals(self.labels_N[at])
        logits_nV = cap_logits(at_least_fp32(raw_nV), scale=self.scale, softcap=self.softcap)
        return Signals(self.labels_N[at], logits_nV)


class ChunkedMean(torch.autograd.Function):
    """Differentiable shell of `chunk_walk`: keeps the ready gradients, not the graph that made them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tokens, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Any:
        """Total and means [K] of the terms."""
        total, means_K, gradients = chunk_walk(tokens, hidden_ND, weight_VD, bias_V, wants=ctx.needs_input_grad[1:])
        ctx.gradients = gradients
        ctx.tokens = max(1, len(tokens.labels_N))
        ctx.mark_non_differentiable(means_K)
        return total, means_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> Any:
        """The ready gradients times the incoming scalar; in place, unless the graph is kept for another time."""
        # The division by N comes last: gradients of a mean over many tokens would underflow in fp16 matmuls.
        factor = grad_total / ctx.tokens
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated before, without retain_graph=True: its gradients are gone")
        if _graph_is_kept():
            return None, *(None if gradient is None else gradient * factor for gradient in ctx.gradients)
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if gradient is None else gradient.mul_(factor) for gradient in gradients)


def _graph_is_kept() -> bool:
    """Whether the backward pass in progress was called with `retain_graph=True`; where torch does not tell, yes."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or bool(tell())


@torch.no_grad()
def chunk_walk(
    tokens: Tokens, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *, wants: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Gradients]:
    """Total, means [K], and the gradients of N * total for those inputs that want one."""
    head = autocast_head((weight_VD, bias_V))
    sink = _Sink(hidden_ND, weight_VD, bias_V, wants)
    # one term without a closed form sends all of them through autograd: they share the graph of a chunk
    closed = all(knows_its_slope(loss) for loss, _ in tokens.terms.values())
    chunks: list[Tensor] = []
    for start in range(0, len(hidden_ND), tokens.chunk):
        at = slice(start, start + tokens.chunk)
        h_nD = hidden_ND[at].to(head[0].dtype)
        # both [n, V], in memory that the next chunk overwrites
        student_nV, teacher_nV = _project("student", h_nD, head), tokens.teacher_logits(at)
        if not any(wants):
            sums_K = _sums(tokens, student_nV, teacher_nV, at)
        elif closed:
            sums_K = _by_rows(tokens, student_nV, teacher_nV, start)
            sink.add(student_nV, h_nD, head[0], at)  # now the gradient lies where the logits were
        else:
            sums_K, grad_nV = _by_autograd(tokens, student_nV, teacher_nV, at)
            sink.add(grad_nV, h_nD, head[0], at)
        chunks.append(sums_K.detach())
    # means are for the log; gradients stay sums until `backward` divides them (see there)
    none_K = at_least_fp32(hidden_ND.new_zeros(len(tokens.terms)))  # where every label is ignored
    means_K = torch.stack(chunks).sum(0) / len(hidden_ND) if chunks else none_K
    weights = [weight for _, weight in tokens.terms.values()]
    return _weighted(weights, means_K), means_K, sink.gradients(weight_VD.dtype)


def _project(whose: str, hidden_nD: Tensor, head: Head) -> Tensor:
    """Hidden states through a head, in its dtype, [n, V]; in the place of the chunk before."""
    weight_VD, bias_V = head
    low_nD, logits_nV = hidden_nD.to(weight_VD.dtype), scratch(whose, (len(hidden_nD), len(weight_VD)), weight_VD)
    if bias_V is None:
        return torch.mm(low_nD, weight_VD.T, out=logits_nV)
    return torch.addmm(bias_V, low_nD, weight_VD.T, out=logits_nV)


def _sums(tokens: Tokens, student_nV: Tensor, teacher_nV: Tensor | None, at: slice) -> Tensor:
    """Sum of every term over one chunk, [K], from projections [n, V]."""
    student, teacher = tokens.signals(student_nV, at), tokens.signals(teacher_nV, at)
    return torch.stack([token_values(name, loss, student, teacher).sum() for name, (loss, _) in tokens.terms.items()])


def _by_autograd(tokens: Tokens, student_nV: Tensor, teacher_nV: Tensor | None, at: slice) -> tuple[Tensor, Tensor]:
    """Sums [K] over one chunk, and the weighted sum's gradient [n, V] in at least float32."""
    logits_nV = at_least_fp32(student_nV).detach().requires_grad_()
    with torch.enable_grad():
        sums_K = _sums(tokens, logits_nV, teacher_nV, at)
        weighted = _weighted([weight for _, weight in tokens.terms.values()], sums_K)
    (grad_nV,) = torch.autograd.grad(weighted, logits_nV)
    return sums_K, grad_nV


def _by_rows(tokens: Tokens, student_nV: Tensor, teacher_nV: Tensor | None, start: int) -> Tensor:
    """Sums [K] over one chunk that begins at token `start`; `student_nV` becomes the weighted sum's gradient."""
    sums: list[Tensor] = []
    for rows in _row_blocks(student_nV):
        at = slice(start + rows.start, start + rows.stop)
        student = tokens.signals(student_nV[rows], at)
        teacher = tokens.signals(None if teacher_nV is None else teacher_nV[rows], at)
        slope_rV, values = None, []
        for name, (loss, weight) in tokens.terms.items():
            values_r, own_rV = values_and_slope(name, loss, student, teacher)  # r rows of the chunk
            values.append(values_r.sum())
            slope_rV = own_rV.mul_(weight) if slope_rV is None else slope_rV.add_(own_rV, alpha=weight)
        assert slope_rV is not None
        assert student.logits is not None
        # these rows of logits are used up: the chunk's memory turns, row after row, into its gradient
        student_nV[rows] = cap_slope(slope_rV, student.logits, scale=tokens.scale, softcap=tokens.softcap)
        sums.append(torch.stack(values))
    return torch.stack(sums).sum(0)


def _row_blocks(logits_nV: Tensor) -> Iterator[slice]:
    """Slices of rows that fit into a cache; a GPU takes all at once, for it a launch costs more than a pass."""
    n, vocabulary = logits_nV.shape
    size = max(1, _ROWS // vocabulary) if logits_nV.device.type == "cpu" else n
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


class _Sink:
    """Gradient buffers of the linear map logits = hidden @ weight.T + bias, reused by every chunk."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wants: tuple[bool, bool, bool]
    ) -> None:
        # a hidden state gets its gradient from one chunk; the head's is a sum over all, and wide for that
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        self.hidden_ND = torch.empty_like(hidden_ND) if wants[0] else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and wants[2] else None
        self._of_chunk_VD: Tensor | None = None  # the head's gradient from one chunk, where it has to be widened

    def add(self, grad_nV: Tensor, h_nD: Tensor, weight_VD: Tensor, at: slice) -> None:
        """Backward of one chunk; matmuls in the dtype of the forward one, sums in that of the buffers."""
        if self.bias_V is not None:
            self.bias_V += grad_nV.sum(0, dtype=self.bias_V.dtype)
        low_nV = grad_nV.to(weight_VD.dtype)
        # dL/dh = dL/dlogits @ W, written to its place without a copy where the dtypes agree
        if self.hidden_ND is not None and self.hidden_ND.dtype == low_nV.dtype:
            torch.mm(low_nV, weight_VD, out=self.hidden_ND[at])
        elif self.hidden_ND is not None:
            self.hidden_ND[at] = low_nV @ weight_VD
        if self.weight_VD is None:
            return
        # dL/dW += dL/dlogits^T @ h
        if self.weight_VD.dtype == low_nV.dtype:
            self.weight_VD.addmm_(low_nV.T, h_nD)
        else:
            if self._of_chunk_VD is None:
                self._of_chunk_VD = torch.empty_like(self.weight_VD, dtype=low_nV.dtype)
            _add_narrow(self.weight_VD, torch.mm(low_nV.T, h_nD, out=self._of_chunk_VD))

    def gradients(self, head_dtype: torch.dtype) -> Gradients:
        """The buffers, those of the head in the head's own dtype."""
        weight_VD, bias_V = (None if x is None else x.to(head_dtype) for x in (self.weight_VD, self.bias_V))
        return self.hidden_ND, weight_VD, bias_V


def _add_narrow(sum_VD: Tensor, addend_VD: Tensor) -> None:
    """Add a tensor of lower precision; on a CPU in blocks, or torch would first widen all of it into fresh memory."""
    for rows in _row_blocks(sum_VD):
        sum_VD[rows].add_(addend_VD[rows])


def _weighted(weights: list[float], values_K: Tensor) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(weights, values_K.unbind(), strict=True)]).sum()
