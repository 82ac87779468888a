"""The forward passes of a training step: what the active terms read of student and teacher, and no block more.

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

from iskd.arch import Stack
from iskd.capture import read
from iskd.documents import with_successor, within
from iskd.losses.base import BatchSignals, Terms, uses_teacher
from iskd.plan import Record, Stage
from iskd.prefix import entrance, standing_in
from iskd.signals import IGNORE, Signals


@dataclass(frozen=True)
class Wanted:
    """What some terms read of a model.

    Attributes:
        layers: layers after which they read the state, in the teacher's numbering.
        last: whether they read the last hidden state: those on logits do, and those that need no other signal.
    """

    layers: frozenset[int] = frozenset()
    last: bool = False


def wanted(terms: Terms, record: Record, stage: Stage, *, of_teacher: bool = False) -> Wanted | None:
    """What the terms of weight > 0 read, or those among them that use the teacher; None when there is no such term."""
    active = [loss for loss, weight in terms.values() if weight > 0 and (not of_teacher or uses_teacher(loss))]
    if not active:
        return None
    survivors = record.layers
    named = {
        "last": survivors[-1:],
        "all": survivors,
        "edited": _standing_for(record.edited, survivors),
        "stage": _standing_for((edit.layer for edit in stage.edits), survivors),
    }
    layers: set[int] = set()
    for loss in active:
        if "hidden" in loss.needs:
            asked = getattr(loss, "layers", "all")
            layers |= set(named[asked] if isinstance(asked, str) else asked) & set(survivors)
    return Wanted(frozenset(layers), any(not loss.needs or "logits" in loss.needs for loss in active))


def _standing_for(edited: Iterable[int], survivors: Sequence[int]) -> Sequence[int]:
    """The layers whose states stand for the outputs of edited ones: of a removed layer, the survivor below it.

    Below a gap at the bottom there is none, so the first survivor does; where nothing is edited, the last layer.
    """
    below = {max((x for x in survivors if x <= layer), default=survivors[0]) for layer in edited}
    return sorted(below) or survivors[-1:]


def within_reach(student: PreTrainedModel, terms: Terms, record: Record, stage: Stage) -> set[int]:
    """Ids of the student's parameters that terms of weight > 0 can give a gradient.

    With a term on logits all of them. With none the head is out of reach, unless it is tied to the embedding; and where
    no term reads the last hidden state either, whatever lies above the last layer read.
    """
    read, stack = wanted(terms, record, stage) or Wanted(), Stack(student)
    everything, body = ({id(p) for p in model.parameters()} for model in (student, stack.base))
    if any(weight > 0 and "logits" in loss.needs for loss, weight in terms.values()):
        return everything
    if read.last:
        return everything - ({id(p) for p in student.get_output_embeddings().parameters()} - body)
    count = max((record.layers.index(layer) + 1 for layer in read.layers), default=0)
    parts = [*entrance(stack), *list(stack.layers)[:count]]
    return {id(p) for part in parts for p in part.parameters()} if count else set()


def freeze_out_of_reach(
    optimizer: torch.optim.Optimizer, student: PreTrainedModel, terms: Terms, record: Record, stage: Stage
) -> list[str]:
    """Freeze what the terms cannot give a gradient, and take it out of the optimizer's groups; its state is kept.

    To be called after every `iskd.optim.regroup`, and before DDP wraps the student. Nothing changes in a stage without
    training, or in one that aligns layers: that has a rule of its own (`iskd.align.reachable`).

    Args:
        optimizer: its groups hold what the stage trains, those named `new` what its edits put in.
        student: the model that is trained.
        terms: loss and weight by name.
        record: the student's edits.
        stage: the one in progress.

    Returns:
        A sentence for the log, or none where nothing was frozen.

    Raises:
        ValueError: a new parameter, or all that the stage trains, is out of reach: it would never learn anything.
    """
    active = ", ".join(name for name, (_, weight) in terms.items() if weight > 0)
    if stage.objective != "loss" or not stage.tokens or not active:
        return []
    reached, names = within_reach(student, terms, record, stage), {id(p): n for n, p in student.named_parameters()}
    groups = optimizer.param_groups
    # what is no part of the student is `iskd.optim.check_partition`'s to tell
    held = [(group["name"], p) for group in groups for p in group["params"] if id(p) in names]
    lost = [(name, p) for name, p in held if id(p) not in reached]
    if not lost:
        return []
    new = [p for name, p in lost if name == "new"]
    if new or len(lost) == len(held):
        first = new[0] if new else lost[0][1]
        raise ValueError(
            f"loss=[{active}] reads nothing that {names[id(first)]} has a part in: it would not train in stage "
            f"{stage.name!r} (schedule.train={stage.train}); add a loss on logits, e.g. kl, or let the layers of a "
            "loss on hidden states reach up to it"
        )
    gone = {id(p) for _, p in lost}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for _, parameter in lost:
        parameter.requires_grad_(False)
    return [
        f"{len(lost)} parameters stay frozen in stage {stage.name!r}, loss=[{active}] reads nothing that they have a "
        f"part in; the first is {names[id(lost[0][1])]}"
    ]


def next_tokens(input_ids: Tensor) -> Tensor:
    """Labels [B, T] of windows [B, T]: the next token, ignored at the last position."""
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], IGNORE)], dim=1)


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
) -> tuple[Signals, Signals | None]:
    """Signals of the student and of the teacher for windows [B, T].

    Args:
        student: the model in training.
        teacher: the frozen original.
        record: the student's edits.
        input_ids: the windows.
        ours: what is read of the student.
        theirs: what is read of the teacher; None = the teacher is not run.
        shared: leading blocks that the teacher computes for both (`iskd.prefix`).
        kept: numbers of the tokens that have a label (`with_successor`); None = they are found here.
    """
    stack = Stack(student)
    labels = within(next_tokens(input_ids), input_ids, stack.separator)
    known = (labels, with_successor(input_ids, stack.separator) if kept is None else kept)
    original: Signals | None = None
    states: dict[int, Tensor] = {}
    shared = 0 if theirs is None else shared
    if theirs is not None:
        # the student's state after a layer stands for the teacher's state after the gap that follows it
        after = {layer: record.state_after(layer) for layer in sorted(theirs.layers)}
        below = {layer for layer in ours.layers if layer < shared} | set(range(shared)[-1:])
        with torch.no_grad():
            last, states = read(
                Stack(teacher), range(record.num_layers), {*after.values(), *below}, input_ids, last=theirs.last
            )
        hidden = {layer: states[target] for layer, target in after.items()}
        original = Signals(labels, last_hidden=last, hidden=hidden)
    above = {layer for layer in ours.layers if layer >= shared}
    with standing_in(stack, shared, states.get(shared - 1)):
        last, own = read(stack, record.layers, above, input_ids, last=ours.last)
    hidden = {layer: own[layer] if layer in above else states[layer] for layer in sorted(ours.layers)}
    return BatchSignals(labels, last_hidden=last, hidden=hidden, known=known), original
