"""Shared machinery of the importance scores: rows by window and their noise, one walk through the stack.

An importance is a plain class with `rows(student, teacher, batches) -> Tensor[L, W]`: one row per block in stack order,
one column per calibration window, float32, on the CPU, higher = keep. Its score, `__call__`, is the mean over windows
[L]. It leaves modes, gradients, `requires_grad`, hooks and random numbers as it found them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.models import Stack, scoring
from iskd.models.capture import Trace


class WindowImportance(ABC):
    """An importance whose score is the mean of its rows; a metric that reads no windows has one column."""

    def choosing(self, candidates: Sequence[int], number: int) -> WindowImportance:
        """This importance for a choice of the `number` lowest among some positions; most score all blocks anyway."""
        return self

    def scored(
        self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Scores [L] of the student's blocks and the rows [L, W] that tell their noise; nan where nothing was read."""
        rows = rows_of(self, student, teacher, batches)
        return rows.mean(1), rows

    @abstractmethod
    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, W] of the student's blocks on each of the W windows in `batches`, token ids [B, T] each."""

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L] of the student's blocks: the mean over windows."""
        with scoring(student, teacher):
            return self.rows(student, teacher, batches).mean(1)


def rows_of(
    importance: Callable[[PreTrainedModel, PreTrainedModel, Sequence[Tensor]], Tensor],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
) -> Tensor:
    """Rows [L, W] of an importance, or its scores as one column [L, 1] where they are not the mean of its rows."""
    if isinstance(importance, WindowImportance) and type(importance).__call__ is WindowImportance.__call__:
        with scoring(student, teacher):
            return importance.rows(student, teacher, batches)
    return importance(student, teacher, batches)[:, None]


def stream(stack: Stack, batch: Tensor) -> Iterator[Tensor]:
    """The stream [B, T, D] before block 0 and after each block in turn, for token ids [B, T]; one forward pass.

    Raises:
        ValueError: windows of one token; their only position is the one that cosines leave out and nothing precedes.
    """
    if batch.shape[1] < 2:
        raise ValueError(f"importance needs windows of at least 2 tokens, got a batch {list(batch.shape)}")
    trace = Trace(stack, batch, 0)
    h_BTD = trace.input
    yield h_BTD
    for position, block in enumerate(stack.layers):
        h_BTD = trace.run(position, block, h_BTD)
        yield h_BTD


def block_rows(
    student: PreTrainedModel,
    batches: Sequence[Tensor],
    measure: Callable[[Tensor, Tensor], Tensor],
    *,
    published: bool = False,
) -> Tensor:
    """Rows [L, W] of a measure of what each block does to the stream.

    `measure(before, after)` takes the stream before and after a block [B, T-1, D] in float32 and returns one value per
    window [B]. Position 0 is left out: in models with an attention sink its norm is hundreds of times that of the rest
    and its direction says nothing about the text. `published`: the states are those that transformers hands out as
    `hidden_states`, position 0 among them and the last one after the final norm, which is what authors' code reads.
    """
    stack, columns = Stack(student), []
    for batch in batches:
        states: Iterator[Tensor] = (
            h_BTD.float() if published else h_BTD[:, 1:].float() for h_BTD in stream(stack, batch)
        )
        if published:
            states = _last_normed(stack, states)
        columns.append(torch.stack([measure(*pair) for pair in itertools.pairwise(states)]).cpu())
    rows = torch.cat(columns, dim=1)
    refuse_not_finite(rows, range(len(rows)), "blocks")
    return rows


def _last_normed(stack: Stack, states: Iterator[Tensor]) -> Iterator[Tensor]:
    """The states [B, T, D], the last one after the final norm."""
    held = next(states)
    for state in states:
        yield held
        held = state
    yield stack.final_norm(held)


def cosine_rows(student: PreTrainedModel, batches: Sequence[Tensor], *, published: bool = False) -> Tensor:
    """1 - mean over tokens of cos(stream before, stream after), per block and window [L, W].

    Source: ShortGPT (arXiv 2403.03853, section 3.1); leaving position 0 out, and the last state before the final norm,
    are ours (`block_rows`).
    """
    return block_rows(
        student,
        batches,
        lambda before, after: (1 - torch.cosine_similarity(before, after, -1)).mean(1),
        published=published,
    )


def refuse_not_finite(values: Tensor, numbers: Sequence[int], what: str = "layers") -> None:
    """Raise ValueError naming what has a value that is not finite.

    NaN compares false with everything: whatever sorts it, takes the least of it or holds it against a bound goes on in
    silence with an order that means nothing.

    Args:
        values: one row per block [L, ...].
        numbers: their numbers [L].
        what: is numbered; positions in the stack are those of `blocks`.
    """
    bad = [number for number, row in zip(numbers, values, strict=True) if not row.isfinite().all()]
    if bad:
        raise ValueError(
            f"the importance of {what} {bad} is not finite, which no order has a place for: take another importance, "
            "other calibration text, or trainer.precision=32-true"
        )


def by_layer(scores: Tensor, layers: Sequence[int]) -> dict[int, float]:
    """Scores [L] of the blocks of a stack by layer number. Raises ValueError when one is not finite."""
    refuse_not_finite(scores, layers)
    return dict(zip(layers, scores.tolist(), strict=True))
