"""Shared machinery of the importance scores: rows by window and their noise, one walk through the stack.

An importance is a plain class with `rows(student, teacher, batches) -> Tensor[L, W]`: one row per block in stack order,
one column per calibration window, float32, on the CPU, higher = keep. Its score, `__call__`, is the mean over windows
[L]. It leaves modes, gradients, `requires_grad`, hooks and random numbers as it found them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from iskd.models import Stack, scoring, surgery
from iskd.models.capture import Trace
from iskd.models.hosting import HostedBlock, HostedMixer
from iskd.plan import Convert, Edit, Spec

_WINDOW, _SINKS = "iskd.mixers.sliding.Sliding", 4


class WindowImportance(ABC):
    """An importance whose score is the mean of its rows; a metric that reads no windows has one column."""

    def choosing(self, candidates: Sequence[int], number: int, layers: Sequence[int]) -> WindowImportance:
        """This importance for a choice of the `number` lowest among some positions; most score all blocks anyway.

        `layers` are the numbers of the student's layers, which are positions of the teacher.
        """
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
    yield stack.normed(held)


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


# ---- which layers keep their attention -------------------------------------------------------------------------------


class Conversions(Protocol):
    """What is done to a layer: the kind of edit of the run."""

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer, its fresh weights drawn under the run's seed."""


class AttentionImportance(WindowImportance):
    """An importance of a block's attention, beside the mixer that would stand in its place.

    Args of its subclasses, beside their own: `convert`, the kind of edit that makes the mixers, `seed` of the run, and
    `stand_in`: recurrent mixers have yet to learn when layers are chosen; softmax in windows of so many tokens, with
    sinks, may stand for them.
    """

    takes = ("convert", "seed")
    convert: Conversions | None
    seed: int
    begin: tuple[int, ...] = ()  # what stands at the head of every window
    stand_in: int | None = (
        None  # tokens of windows that stand for mixers which are no attention before they have learnt
    )
    candidates: tuple[int, ...] | None = None  # which may be converted; None = all that have an attention
    number: int | None = None  # how many of them are going to be converted
    layers: tuple[int, ...] | None = None  # numbers of the student's layers; None = it has all of the teacher's

    def in_question(
        self, student: PreTrainedModel, tokens: int, *, recall: bool = False
    ) -> tuple[list[int], dict[int, nn.Module]]:
        """Positions in question, and each one's block with a mixer for its attention.

        The blocks share norms and MLP with the student's, which stays as it is.

        Args:
            student: the model.
            tokens: of the longest window of text.
            recall: whether scores ask for what stood half a window ago alone, where no sink is.

        Raises:
            ValueError: the run converts nothing, the student is in shards, no block has an attention of its own, or no
                mixer would miss anything of what is asked.
        """
        name = type(self).__name__.lower()
        if isinstance(student, FSDPModule):
            raise ValueError(
                f"importance={name} puts blocks together anew, and trainer=fsdp holds them in shards; score on one "
                "device first (iskd score, importance=fixed takes the scores)"
            )
        stack = Stack(student)
        having = [position for position, block in enumerate(stack.layers) if _has_attention(stack, block)]
        found = [position for position in having if self.candidates is None or position in self.candidates]
        if not found:
            raise ValueError(f"importance={name}: no block that may be converted has an attention of its own left")
        numbers = self.layers or range(len(stack.layers))
        convert, seed = self.convert, self.seed
        edits = {} if convert is None else {at: convert.make(numbers[at], seed) for at in found}
        made = {
            position: surgery.build_converted(stack, stack.layers[position], edit)
            for position, edit in edits.items()
            if isinstance(edit, Convert)
        }
        path, stands = f"{stack.family.attn}.mixer", set[int]()
        if self.stand_in is not None:
            for position, block in made.items():
                if not getattr(block.get_submodule(path), "exact", 0):
                    stands.add(position)
                    keys = {"window": self.stand_in, "sinks": min(_SINKS, self.stand_in), "feature_map": "none"}
                    edit = Convert(numbers[position], Spec(_WINDOW, keys), seed=0)
                    made[position] = surgery.build_converted(stack, stack.layers[position], edit)
        if len(made) < len(found):
            raise ValueError(
                f"importance={name} says which layers keep their attention when the others are converted: it needs "
                "edit=convert and a mixer, or another importance"
            )
        missed = {position: _sees(block.get_submodule(path), recall=recall) for position, block in made.items()}
        if min(missed.values()) >= (tokens // 2 if recall else tokens):
            least = min(missed, key=lambda position: missed[position])
            asked = f"{tokens // 2} tokens back (half of data.seq_len)" if recall else f"{tokens} tokens (data.seq_len)"
            key = "importance.stand_in" if least in stands else "mixer.window"
            raise ValueError(
                f"importance={name}: mixers that see {missed[least]} tokens are attention itself where the text asks "
                f"for {asked}, so that no layer is missed: lower {key}, or raise data.seq_len"
            )
        return found, made


def _sees(mixer: nn.Module, *, recall: bool) -> int:
    """Up to how many tokens a mixer is the attention itself; for `recall` without those that are sinks."""
    exact = int(getattr(mixer, "exact", 0))
    return max(0, exact - int(getattr(mixer, "sinks", 0))) if recall else exact


def _has_attention(stack: Stack, block: nn.Module) -> bool:
    return not isinstance(block, HostedBlock) and not isinstance(block.get_submodule(stack.family.attn), HostedMixer)


@contextmanager
def standing_in(stack: Stack, blocks: Mapping[int, nn.Module]) -> Iterator[None]:
    """Other blocks at some positions of a stack; afterwards it is the stack that it was."""
    own = stack.layers
    try:
        stack.set_layers([blocks.get(position, block) for position, block in enumerate(own)])
        yield
    finally:
        setattr(stack.base, stack.family.layers, own)


def repeated(batches: Sequence[Tensor], separator: int | None, begin: Sequence[int] = ()) -> list[Tensor]:
    """Windows [B, T] whose second half, the last T // 2 tokens, says the tokens before it again: text to be recalled.

    Made of the calibration text's own tokens in their order, without those that keep documents apart, or no second half
    would see its first.

    Args:
        batches: calibration windows.
        separator: what keeps documents apart, or None.
        begin: what stands at the head of every window (`data.bos=window`), and of these too.

    Raises:
        ValueError: a window that has no room for it.
    """
    found = []
    for batch in batches:
        text, head = batch[:, len(begin) :], batch.new_tensor(begin)
        half = text.shape[1] // 2
        tokens = text.flatten() if separator is None else text[text != separator]
        tokens = tokens[: len(tokens) // max(half, 1) * half]
        if half < 2 or not len(tokens):
            raise ValueError(f"importance.metric=recall says half a window twice, got a batch {list(batch.shape)}")
        once = tokens.view(-1, half)
        found.append(torch.cat([head.expand(len(once), -1), once, once], dim=1))
    return found
