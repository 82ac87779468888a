"""Shared machinery of the importance scores: one walk through the stack, in which every layer can be left out.

An importance is a plain class with `__call__(student, teacher, batches) -> Tensor[blocks]` in stack order, float32,
higher = keep. It leaves mode, gradients and hooks as it found them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.arch import Stack
from iskd.capture import Trace


@contextmanager
def scoring(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes are put back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def cosine_influence(student: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
    """1 - mean over tokens of cos(state before, state after) per block [L], rows in float32.

    Position 0 is left out: in models with an attention sink its norm is hundreds of times that of the rest and its
    direction says nothing about the text (ShortGPT, arXiv 2403.03853, defines the score; the exclusion is ours).
    """
    stack = Stack(student)
    total, count = torch.zeros(len(stack.layers)), 0
    for batch in batches:
        trace = Trace(stack, batch, 0)
        h_BTD = trace.input
        for position, block in enumerate(stack.layers):
            after = trace.run(position, block, h_BTD)
            total[position] += (1 - torch.cosine_similarity(h_BTD.float(), after.float(), dim=-1))[:, 1:].sum().cpu()
            h_BTD = after
        count += batch.shape[0] * (batch.shape[1] - 1)
    return total / count


def leave_one_out(
    student: PreTrainedModel, batches: Sequence[Tensor], score: Callable[[int, Tensor], Tensor], stride: int
) -> Tensor:
    """Score of the student without each of its blocks in turn [L].

    The branch "without block i" starts from the stream before block i, so the prefix is computed once for all branches.
    `score(batch_index, logits [B, T', V])` returns the sum over tokens; only every `stride`-th position has logits.
    """
    stack = Stack(student)
    weight, bias = stack.head
    total = torch.zeros(len(stack.layers))
    for index, batch in enumerate(batches):
        trace = Trace(stack, batch, 0)
        h_BTD = trace.input
        for position, block in enumerate(stack.layers):
            branch = h_BTD
            for later in range(position + 1, len(stack.layers)):
                branch = trace.run(later, stack.layers[later], branch)
            final = stack.finish(branch)[:, ::stride]
            total[position] += score(index, nn.functional.linear(final.to(weight.dtype), weight, bias)).float().cpu()
            h_BTD = trace.run(position, block, h_BTD)
    return total


def ablation_kl(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor], stride: int) -> Tensor:
    """KL(teacher || student without block i) in nats per scored token, per block [L]."""
    stack = Stack(teacher)
    weight, bias = stack.head
    targets = []
    for batch in batches:
        final = stack.last_hidden(batch)[:, ::stride]
        logits = nn.functional.linear(final.to(weight.dtype), weight, bias)
        targets.append(torch.log_softmax(logits.float(), dim=-1))

    def kl(index: int, logits: Tensor) -> Tensor:
        log_q = torch.log_softmax(logits.float(), dim=-1)
        return (targets[index].exp() * (targets[index] - log_q)).sum()

    tokens = sum(target.shape[0] * target.shape[1] for target in targets)
    return leave_one_out(student, batches, kl, stride) / tokens


def by_layer(scores: Tensor, layers: Sequence[int]) -> dict[int, float]:
    """Scores [L] of the blocks of a stack by layer number. Raises ValueError when one is not finite."""
    if not scores.isfinite().all():
        raise ValueError(f"importance gave a score that is not finite: {scores.tolist()}")
    return dict(zip(layers, scores.tolist(), strict=True))
