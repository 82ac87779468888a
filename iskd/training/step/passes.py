"""Forward passes of a training step through student and teacher, each as short as the active loss terms allow.

A term of weight 0 is switched off and costs nothing. No term reads the teacher: no teacher's pass. Terms read hidden
states alone: the pass ends after the last layer that they read, without final norm. Nobody needs the logits of either
model here; they are made of the last hidden states, chunk by chunk, in `iskd.losses.chunked`.

What lies above the last layer read, or is a head that no term reads, gets no gradient. It must not train (DDP waits for
the gradient of every parameter that does, and decay would move it all the same): `within_reach` says what may.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.losses import BatchSignals, Terms, traits_of
from iskd.models import Signals, Stack
from iskd.models.capture import read
from iskd.models.packing import with_successor, within
from iskd.models.signals import next_tokens
from iskd.plan import Record, Stage
from iskd.training.step.shared_prefix import standing_in
from iskd.training.step.spans import StepSpan, span


@dataclass(frozen=True)
class Wanted:
    """The hidden states that some loss terms read of a model.

    Attributes:
        layers: layers after which they read the state, in the teacher's numbering.
        last: whether they read the last hidden state: those on logits do, and those that need no other signal.
    """

    layers: frozenset[int] = frozenset()
    last: bool = False


def wanted(terms: Terms, record: Record, stage: Stage, *, of_teacher: bool = False) -> Wanted | None:
    """What the terms of weight > 0 read, or those among them that use the teacher; None when there is no such term."""
    active = [
        loss for loss, weight in terms.values() if weight > 0 and (not of_teacher or traits_of(loss).uses_teacher)
    ]
    if not active:
        return None
    survivors = record.layers
    # what a loss may call by a word (`layers=edited`); layers that it numbers are taken as they are
    named = {
        "last": survivors[-1:],
        "all": survivors,
        "edited": _standing_for(record.edited, survivors),
        "stage": _standing_for((edit.layer for edit in stage.fresh(record)), survivors),
    }
    layers: set[int] = set()
    for loss in active:
        if "hidden" in loss.needs:
            asked = traits_of(loss).layers
            layers |= set(named[asked] if isinstance(asked, str) else asked) & set(survivors)
    return Wanted(frozenset(layers), any(not loss.needs or "logits" in loss.needs for loss in active))


def _standing_for(edited: Iterable[int], survivors: Sequence[int]) -> Sequence[int]:
    """The layers whose states stand for the outputs of edited ones: of a removed layer, the survivor below it.

    Below a gap at the bottom there is none, so the first survivor does; where nothing is edited, the last layer.
    """
    below = {max((x for x in survivors if x <= layer), default=survivors[0]) for layer in edited}
    return sorted(below) or survivors[-1:]


def both(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    record: Record,
    input_ids: Tensor,
    ours: Wanted,
    theirs: Wanted | None,
    shared: int = 0,
    *,
    kept: Tensor | None = None,
    targets: Tensor | None = None,
) -> tuple[Signals, Signals | None]:
    """One forward pass of each model on windows [B, T]: signals of the student, and of the teacher.

    Args:
        student: the model in training.
        teacher: the frozen original.
        record: the student's edits.
        input_ids: the windows.
        ours: what is read of the student.
        theirs: what is read of the teacher; None = the teacher is not run.
        shared: leading blocks that the teacher computes for both (`iskd.training.step.shared_prefix`).
        kept: numbers of the tokens that have a label (`with_successor`); None = they are found here.
        targets: which tokens [B, T] are to be predicted; None = all.
    """
    stack = Stack(student)
    labels = within(next_tokens(input_ids, targets), input_ids, stack.separator)  # [B, T]
    # which tokens have a label [N] goes with the labels, so that no loss asks the device for it
    known = (labels, with_successor(input_ids, stack.separator, targets) if kept is None else kept)
    original: Signals | None = None
    states: dict[int, Tensor] = {}  # of the teacher after its layers, each [B, T, D]
    shared = 0 if theirs is None else shared  # nobody computes them for both where the teacher is not run
    if theirs is not None:
        # the student's state after a layer stands for the teacher's state after the gap that follows it
        after = {layer: record.state_after(layer) for layer in sorted(theirs.layers)}
        # in the shared blocks its states are the student's too, and the last one is where the student's pass begins
        below = {layer for layer in ours.layers if layer < shared} | set(range(shared)[-1:])
        with span(StepSpan.TEACHER), torch.no_grad():
            last, states = read(
                Stack(teacher), range(record.num_layers), {*after.values(), *below}, input_ids, last=theirs.last
            )
        hidden = {layer: states[target] for layer, target in after.items()}
        original = Signals(labels, last_hidden=last, hidden=hidden)
    # the student's own blocks alone, with gradients
    above = {layer for layer in ours.layers if layer >= shared}
    with standing_in(stack, shared, states.get(shared - 1)), span(StepSpan.STUDENT):
        last, own = read(stack, record.layers, above, input_ids, last=ours.last)
    hidden = {layer: own[layer] if layer in above else states[layer] for layer in sorted(ours.layers)}
    return BatchSignals(labels, last_hidden=last, hidden=hidden, known=known, divisor=stack.logits_divisor), original
