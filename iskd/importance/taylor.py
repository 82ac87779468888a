"""Taylor: what the loss would do, to first order, if a block's weights were scaled towards zero.

    score = |sum over the block's parameters of w * dL/dw|        L = mean next-token cross-entropy of one window

Source: Molchanov et al. (arXiv 1611.06440, section 2.2), for whole blocks Shortened LLaMA (arXiv 2402.02834, section
3). The latter sums |w * dL/dw| per weight; inside the sum, as here, what weights of one block do together counts,
which is the derivative of the loss by a common factor on them.

The backward pass goes block by block from states kept at the block borders, so memory holds the gradients of one block
at a time and no `.grad` is touched; the price is a second forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.importance.base import WindowImportance
from iskd.models import Stack, scoring
from iskd.models.capture import Trace
from iskd.models.sharding import is_sharded


class Taylor(WindowImportance):
    """|sum of weight x gradient| per block in nats per token; one backward pass per window.

    Args:
        chunk: positions whose logits exist at the same time.

    Source: Molchanov et al. (arXiv 1611.06440); of blocks: Shortened LLaMA (arXiv 2402.02834)
    Needs: calibration tokens (`run.score_tokens`)
    Costs: two forward passes and one backward pass a window, gradients of one block at a time
    Measured: not measured
    """

    def __init__(self, chunk: int = 256) -> None:
        if chunk < 1:
            raise ValueError(f"importance.chunk must be at least 1 position, got {chunk}")
        self.chunk = chunk

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, W] of the student's blocks on calibration windows [B, T].

        Raises:
            ValueError: the student is in shards, or windows have one token.
        """
        if is_sharded(student):
            raise ValueError(
                "importance=taylor needs whole weights, and trainer=fsdp holds them in shards; "
                "score on one device first (importance=fixed takes the scores) or choose another importance"
            )
        short = next((batch for batch in batches if batch.shape[1] < 2), None)
        if short is not None:
            raise ValueError(f"importance needs windows of at least 2 tokens, got a batch {list(short.shape)}")
        stack = Stack(student)
        with scoring(student), _differentiable(stack.layers.parameters()):
            columns = [self._column(stack, window.clone()) for batch in batches for window in batch.split(1)]
        return torch.stack(columns, dim=1)

    def _column(self, stack: Stack, window: Tensor) -> Tensor:
        """Scores [L] on one window [1, T]."""
        trace = Trace(stack, window, 0)
        states = [trace.input]
        for position, block in enumerate(stack.layers):
            states.append(trace.run(position, block, states[-1]))
        scores = torch.zeros(len(stack.layers))
        with torch.enable_grad():
            gradient = self._at_the_top(stack, states.pop(), window)
            for position in reversed(range(len(stack.layers))):
                block, before = stack.layers[position], states.pop().detach().requires_grad_()
                weights = list(block.parameters())
                after = trace.run(position, block, before)
                gradient, *gradients = torch.autograd.grad(after, [before, *weights], gradient, allow_unused=True)
                scores[position] = _inner_product(weights, gradients).abs()
        return scores

    def _at_the_top(self, stack: Stack, h_1TD: Tensor, window: Tensor) -> Tensor:
        """Gradient [1, T, D] of the loss of one window [1, T] by the state after the last block."""
        weight, bias = stack.head
        gradient, scored = torch.zeros_like(h_1TD), window.shape[1] - 1
        for start in range(0, scored, self.chunk):
            tokens = slice(start, min(start + self.chunk, scored))
            state = h_1TD[0, tokens].detach().requires_grad_()
            logits = nn.functional.linear(stack.final_norm(state).to(weight.dtype), weight, bias).float()
            if stack.softcap:
                logits = stack.softcap * torch.tanh(logits / stack.softcap)
            loss = nn.functional.cross_entropy(logits, window[0, 1:][tokens], reduction="sum") / scored
            (gradient[0, tokens],) = torch.autograd.grad(loss, state)
        return gradient


def _inner_product(weights: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> Tensor:
    """Sum over parameters of weight x gradient; a parameter that was not used has no gradient."""
    total = torch.zeros(())
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            total += (weight.detach().float() * gradient.float()).sum().cpu()
    return total


@contextmanager
def _differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let gradients by `parameters` be asked for, under autocast and in inference mode too; put back afterwards."""
    frozen = [p for p in parameters if not p.requires_grad]
    caches = torch.is_autocast_cache_enabled()
    # torch before 2.10 reuses casts of weights that were made without gradients, and no gradient comes through
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        torch.set_autocast_cache_enabled(caches)
