"""Refits one after another, each kept only where it brings the student nearer to its teacher on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.blocks.streams import Streams
from iskd.evaluation import measure_quality
from iskd.models import Stack, scoring, sharding
from iskd.models.capture import without_autocast_cache
from iskd.plan import Convert, Edit, Record, Remove, Replace, Stage
from iskd.plan.edits import Merge
from iskd.refits.base import Refit, RefitTask
from iskd.refits.reading import Text, readers, short_of, split
from iskd.system import Ranks
from iskd.teacher import TeacherStates

_ROUNDING = 1e-6  # nats


def refit_survivors(
    refits: Sequence[Refit],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    record: Record,
    edits: Sequence[Edit],
    text: Text,
    *,
    ranks: Ranks | None = None,
    opened: Callable[[int], AbstractContextManager[None]] = lambda _layer: nullcontext(),
    check_stop: Callable[[], None] = lambda: None,
    states: TeacherStates | None = None,
    folder: Path | None = None,
) -> list[str]:
    """Refit the surviving blocks of `student` after `edits`; a collective.

    Args:
        refits: in order.
        student: changed in place, weights alone.
        teacher: the frozen original.
        record: the student's edits.
        edits: those that the refits follow.
        text: of the run, of which each reads as much as it asks for; the same on every rank.
        ranks: the processes of the run; each takes its share of the windows, or of the layers (`Refit.by_layers`).
        opened: see `RefitTask`.
        check_stop: see `RefitTask`.
        states: see `RefitTask`.
        folder: see `RefitTask`.

    Returns:
        Sentences for the run's record: what each refit did, and what it was worth.

    Raises:
        ValueError: there is too little text, or a state is not finite, of the teacher or of the student.
    """
    ranks, events, training = ranks or Ranks(), [], student.training
    with scoring(student, teacher), without_autocast_cache():
        first: dict[str, Tensor] = {}  # weights before a refit that is judged together with the next one
        for number, refit in enumerate(refits, 1):
            start, name = time.perf_counter(), refit.name()
            fit, fold_of, held = split(text, refit, readers(refit, ranks, sharded=sharding.is_sharded(student)))
            task = RefitTask(
                student, teacher, record, edits, fit, held, fold_of, ranks, opened, check_stop, states, folder
            )
            expected = task.streams(refit.streams)
            before = _kl_with(task, expected, first)
            if not ranks.first(math.isfinite(before)):
                raise ValueError(
                    f"refit.{name}: the KL between teacher and student is not finite on held-out calibration text, "
                    "before anything is refitted; check the weights of both, or train in float32 "
                    "(trainer.precision=32-true)"
                )
            kept = _weights(student, refit.changes(task)) | first
            told = refit.refit(task)
            after = _kl(task, expected)
            better = ranks.first(after < before - _ROUNDING)
            waits = not better and refit.prepares and number < len(refits) and ranks.first(math.isfinite(after))
            if not better and not waits:
                _put_back(student, kept)
            seconds = time.perf_counter() - start
            events += [f"refit {name}: {line}" for line in (*told, *short_of(refit, text))]
            verdict = ""
            if waits:
                verdict = f"; left for {refits[number].name()}, and judged with it"
            elif not better:
                undone = "it changed nothing" if after == before else f"taken back, so it is {before:.4f} again"
                verdict = f"; {undone}" + (" (with what waited for it)" if first else "")
            first = kept if waits else {}
            events.append(f"refit {name}: held-out KL {before:.4f} -> {after:.4f} in {seconds:.0f} s{verdict}")
    student.train(training)  # blocks that were opened are other modules than those whose modes were put back
    return events


def check_refits(
    refits: Sequence[Refit],
    teacher: PreTrainedModel,
    edits: Sequence[Edit],
    text: Text,
    ranks: Ranks,
    *,
    sharded: bool = False,
) -> None:
    """Raise ValueError for refits that could not be carried out, so that no run comes to it after hours.

    Args:
        refits: in order, on the text that they will read.
        teacher: the frozen original.
        edits: all of the student by then.
        text: of the run, the same on every rank.
        ranks: the processes that refit together.
        sharded: whether the student is in shards then.
    """
    for refit in refits:
        refit.check(Stack(teacher), edits)
        split(text, refit, readers(refit, ranks, sharded=sharded))


def check_sizes(stages: Sequence[tuple[Stage, Sequence[Refit]]], states: Sequence[str]) -> None:
    """Raise ValueError for what would aim at the teacher's states once a refit has made the stream of another size.

    Args:
        stages: all of a run, each with the refits that follow its edits.
        states: names of losses that compare the size of states with the teacher's.
    """
    by, aiming, removed = "", list[str](), False
    for stage, refits in stages:
        removed |= any(isinstance(edit, Remove) for edit in stage.edits)
        if by and any(isinstance(edit, Merge) or (isinstance(edit, Replace) and stage.fit) for edit in stage.edits):
            aiming.append("the fit of blocks (edit.fit)")
        for refit in refits:
            aiming += [f"refit={refit.name()}"] if by and not refit.resizes else []
            by = refit.name() if refit.resizes and removed else by
        if by and stage.tokens:
            aiming += [f"loss={name}" for name in states] if stage.objective == "loss" else []
            aiming += [f"stage {stage.name!r}"] if stage.objective in ("mixer_output", "hidden") else []
    if aiming:
        raise ValueError(
            f"refit={by} makes the stream below a cut larger than the teacher's, and {aiming[0]} would aim at states "
            "of the teacher's own size afterwards: leave one of the two out"
        )


def check_used(refits: Sequence[Refit], edits: Sequence[Edit]) -> None:
    """Raise ValueError for a refit of mixers where none of a run's edits makes one."""
    idle = [refit.name() for refit in refits if refit.for_mixers]
    if idle and not any(isinstance(edit, Convert) for edit in edits):
        raise ValueError(
            f"refit={idle[0]} is for the mixers of edit=convert, and this run converts no layer: leave {idle[0]} out "
            "of refit=[...]"
        )


def _kl(task: RefitTask, expected: Streams) -> float:
    """Nats per token between teacher and student on the held-out windows of all ranks.

    `expected` are the teacher's states there, which are computed where they are missing.
    """
    batches = [{"input_ids": windows} for windows in task.held]
    kl = measure_quality(task.student, task.teacher, batches, expected)["kl"]
    sharding.reshard(task.student)  # after a pass the root is whole, and its parameters are not those of the optimizer
    return kl


def _kl_with(task: RefitTask, expected: Streams, others: dict[str, Tensor]) -> float:
    """`_kl` of the student with other weights, by name; afterwards it has its own again."""
    if not others:
        return _kl(task, expected)
    own = _named(task.student, others)
    _put_back(task.student, others)
    kl = _kl(task, expected)
    _put_back(task.student, own)
    return kl


def _weights(student: PreTrainedModel, modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The weights of some modules of the student, by their names there; in shards those that are here."""
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    return _named(student, {name for name, parameter in student.named_parameters() if id(parameter) in held})


def _named(student: PreTrainedModel, names: Collection[str]) -> dict[str, Tensor]:
    """Copies of the weights of these names; in shards of what is here."""
    return {
        name: sharding.local(parameter.detach()).cpu().clone()
        for name, parameter in student.named_parameters()
        if name in names
    }


def _put_back(student: PreTrainedModel, kept: dict[str, Tensor]) -> None:
    for name, parameter in student.named_parameters():
        if name in kept:
            sharding.local(parameter.detach()).copy_(kept[name])
