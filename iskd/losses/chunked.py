"""The chunked loss: add up loss terms without ever holding logits for a whole batch.

Logits [B, T, V] and their gradient are the largest tensors of distillation. Ignored tokens are dropped first; the
other N are walked in chunks, and the gradient of the weighted sum

    L = sum_k weight_k * mean_N loss_k(logits_n, teacher_logits_n)

with respect to the hidden states and the head is formed during the forward pass, chunk by chunk
(`iskd.losses.chunk_walk`), so that one chunk of logits is alive at a time. The backward pass only multiplies by the
incoming scalar; first order only. The idea is that of fused linear cross-entropy (Liger Kernel, arXiv 2410.10989,
section 3), here in plain PyTorch and for any per-token term. `naive_vocabulary_loss` is the obvious reference, and what
`chunk=None` switches to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.losses.base import (
    Terms,
    check_batch,
    check_terms,
    keeping,
    kept_tokens,
    masked_mean,
    mean_of,
    token_values,
    traits_of,
)
from iskd.losses.chunk_size import Chunk, chunk_tokens
from iskd.losses.chunk_walk import ChunkedMean, Tokens, chunk_walk
from iskd.models import Head, Signals, at_least_fp32, autocast_head, cap_logits


def total_loss(
    terms: Terms,
    student: Signals,
    teacher: Signals | None,
    student_head: Head,
    teacher_head: Head | None,
    *,
    chunk: Chunk = 256,
    scale: float = 1.0,
    softcap: float | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of all terms: those on logits in chunks, the others on the whole signals.

    Args:
        terms: Loss and weight by name; a term of weight 0 is switched off, i.e. neither computed nor reported.
        student: Signals of a batch; `last_hidden` is read if a term needs logits.
        teacher: The same for the teacher; None if no term uses it.
        student_head: Weight [V, D] and bias [V] or None.
        teacher_head: The same for the teacher; None if no term on logits uses it.
        chunk: Tokens per chunk of logits; "auto" = what suits the device (`iskd.losses.chunk_size`); None = the naive
            reference, whole logits by autograd.
        scale: Multiplies the logits of both models.
        softcap: Caps the logits of both models by tanh; None = no cap.
        kept: Numbers [N] of the tokens in the flattened batch whose labels are not ignored, where the caller knows
            them; None = as the student's signals say (`iskd.losses.base.kept_tokens`).

    Returns:
        The scalar total with its gradient, and the unweighted, detached mean of every term by name; without a valid
        label all of them are 0.

    Raises:
        ValueError: Bad terms (see `check_terms`) or a missing signal.
    """
    check_terms(terms)
    # a term of weight 0 is not computed at all, so it may ask for signals that nobody captured
    terms = {name: (loss, weight) for name, (loss, weight) in terms.items() if weight > 0}
    if not terms:
        raise ValueError("every loss weight is 0: nothing would train; give at least one term a weight > 0")
    readers = [name for name, (loss, _) in terms.items() if traits_of(loss).uses_teacher]
    if readers and teacher is None:
        raise ValueError(f"loss terms {readers} use the teacher; pass its signals")
    kept = kept_tokens(student) if kept is None else kept
    means: dict[str, Tensor] = {}
    totals: list[Tensor] = []
    # terms on logits share the logits of a chunk; all others see the whole signals, which are small
    on_logits = {name: term for name, term in terms.items() if "logits" in term[0].needs}
    if on_logits:
        if student.last_hidden is None:
            raise ValueError(f"loss terms {list(on_logits)} need logits, but the student's signals have no last_hidden")
        inputs = (student.last_hidden, student_head, teacher.last_hidden if teacher else None, teacher_head)
        if chunk is None:
            total, by_name = naive_vocabulary_loss(on_logits, *inputs, student.labels, scale=scale, softcap=softcap)
        else:
            total, by_name = chunked_vocabulary_loss(
                on_logits, *inputs, student.labels, chunk=chunk, scale=scale, softcap=softcap, kept=kept
            )
        means.update(by_name)
        totals.append(total)
    for name, (loss, weight) in terms.items():
        if name not in on_logits:
            values = token_values(name, loss, student, teacher or Signals(student.labels))  # [B, T]
            mean = mean_of(values.flatten().index_select(0, kept))
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
    chunk: int | str = 256,
    scale: float = 1.0,
    softcap: float | None = None,
    kept: Tensor | None = None,
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
        chunk: Tokens per chunk, or "auto" (`iskd.losses.chunk_size`).
        scale: Multiplies the logits of both models.
        softcap: Caps the logits of both models by tanh; None = no cap.
        kept: Numbers [N] of the tokens in the flattened batch whose labels are not ignored; None = look.

    Returns:
        The scalar total with its gradient, and the unweighted, detached mean of every term over the valid tokens.

    Raises:
        ValueError: Bad terms, shapes that do not belong together, chunk < 1, or no teacher.
    """
    vocabulary = max(len(head[0]) for head in (student_head, teacher_head) if head is not None)
    size = chunk_tokens(chunk, labels_BT.device, vocabulary)
    check_batch(terms, student_hidden_BTD, teacher_hidden_BTD, teacher_head, labels_BT)
    # from here on no batch and no ignored token: N rows, of which a chunk is a slice
    take = keeping(kept_tokens(Signals(labels_BT)) if kept is None else kept, labels_BT.numel())
    teacher_ND: Tensor | None = None
    if teacher_hidden_BTD is not None and any(traits_of(loss).uses_teacher for loss, _ in terms.values()):
        teacher_ND = take(teacher_hidden_BTD.detach())
    frozen_head = None if teacher_head is None else autocast_head(teacher_head)
    tokens = Tokens(terms, take(labels_BT), teacher_ND, frozen_head, size, scale, softcap)
    student_ND, (weight_VD, bias_V) = take(student_hidden_BTD), student_head
    inputs = (student_ND, weight_VD, bias_V)
    # the gradients are made in the forward pass, so only where somebody will ask for them
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        total, means_K = ChunkedMean.apply(tokens, *inputs)  # type: ignore[no-untyped-call]
    else:
        total, means_K, _ = chunk_walk(tokens, *inputs, wants=(False, False, False))
    return total, dict(zip(terms, means_K.unbind(), strict=True))


def naive_vocabulary_loss(
    terms: Terms,
    student_hidden_BTD: Tensor,
    student_head: Head,
    teacher_hidden_BTD: Tensor | None,
    teacher_head: Head | None,
    labels_BT: Tensor,
    *,
    chunk: Chunk = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reference for `chunked_vocabulary_loss`: whole logits [B, T, V] and plain autograd; `chunk` has no effect."""
    check_batch(terms, student_hidden_BTD, teacher_hidden_BTD, teacher_head, labels_BT)

    def logits(hidden_BTD: Tensor, head: Head) -> Tensor:
        return cap_logits(at_least_fp32(F.linear(hidden_BTD, *head)), scale=scale, softcap=softcap)

    student, teacher = Signals(labels_BT, logits(student_hidden_BTD, student_head)), Signals(labels_BT)
    if teacher_hidden_BTD is not None and teacher_head is not None:
        with torch.no_grad():
            teacher.logits = logits(teacher_hidden_BTD.to(teacher_head[0].dtype), teacher_head)
    means = {
        name: masked_mean(token_values(name, loss, student, teacher), labels_BT) for name, (loss, _) in terms.items()
    }
    total = torch.stack([terms[name][1] * mean for name, mean in means.items()]).sum()
    return total, {name: mean.detach() for name, mean in means.items()}
