"""Refits one after another, each kept only where it brings the student nearer to its teacher on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.blocks.streams import Streams
from iskd.evaluation import measure_quality
from iskd.models import Stack, scoring, sharding
from iskd.models.capture import without_autocast_cache
from iskd.plan import Convert, Edit, Record
from iskd.refits.base import Refit, RefitTask
from iskd.system import Ranks
from iskd.teacher import TeacherStates

_BATCH = 2048  # tokens of a process
_ROUNDING = 1e-6  # nats
_JUDGED = 3  # passes over the text held out


def refit_survivors(
    refits: Sequence[Refit],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    record: Record,
    edits: Sequence[Edit],
    windows: Callable[[int], Sequence[Tensor]],
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
        windows: gives calibration windows [B, T] of so many tokens, the same on every rank.
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
        for refit in refits:
            start, name = time.perf_counter(), refit.name()
            text = windows(refit.tokens + refit.held_tokens)
            fit, fold_of, held = split(text, refit, _readers(refit, ranks, sharded=sharding.is_sharded(student)))
            task = RefitTask(
                student, teacher, record, edits, fit, held, fold_of, ranks, opened, check_stop, states, folder
            )
            expected = task.streams(refit.streams)
            before = _kl(task, expected)
            if not ranks.first(math.isfinite(before)):
                raise ValueError(
                    f"refit.{name}: the KL between teacher and student is not finite on held-out calibration text, "
                    "before anything is refitted; check the weights of both, or train in float32 "
                    "(trainer.precision=32-true)"
                )
            kept = _weights(student, refit.changes(task))
            told = refit.refit(task)
            after = _kl(task, expected)
            better = ranks.first(after < before - _ROUNDING)
            if not better:
                _put_back(student, kept)
            seconds = time.perf_counter() - start
            events += [f"refit {name}: {line}" for line in (*told, *short_of(refit, text))]
            undone = "it changed nothing" if after == before else f"taken back, so it is {before:.4f} again"
            events.append(
                f"refit {name}: held-out KL {before:.4f} -> {after:.4f} in {seconds:.0f} s"
                + ("" if better else f"; {undone}")
            )
    student.train(training)  # blocks that were opened are other modules than those whose modes were put back
    return events


def check_refits(
    refits: Sequence[Refit],
    teacher: PreTrainedModel,
    edits: Sequence[Edit],
    windows: Callable[[int], Sequence[Tensor]],
    ranks: Ranks,
    *,
    sharded: bool = False,
) -> None:
    """Raise ValueError for refits that could not be carried out, so that no run comes to it after hours.

    Args:
        refits: in order, on the text that they will read.
        teacher: the frozen original.
        edits: all of the student by then.
        windows: gives calibration windows [B, T] of so many tokens, the same on every rank.
        ranks: the processes that refit together.
        sharded: whether the student is in shards then.
    """
    for refit in refits:
        refit.check(Stack(teacher), edits)
        split(windows(refit.tokens + refit.held_tokens), refit, _readers(refit, ranks, sharded=sharded))


def check_used(refits: Sequence[Refit], edits: Sequence[Edit]) -> None:
    """Raise ValueError for a refit of mixers where none of a run's edits makes one."""
    idle = [refit.name() for refit in refits if refit.for_mixers]
    if idle and not any(isinstance(edit, Convert) for edit in edits):
        raise ValueError(
            f"refit={idle[0]} is for the mixers of edit=convert, and this run converts no layer: leave {idle[0]} out "
            "of refit=[...]"
        )


def _readers(refit: Refit, ranks: Ranks, *, sharded: bool) -> Ranks:
    """The processes that share out a refit's windows: this one alone where they share out whole layers."""
    return Ranks() if refit.by_layers and not sharded else ranks


def training_tokens(refits: Sequence[Refit], windows: Callable[[int], Sequence[Tensor]] | None = None) -> float:
    """Training tokens that take about as long as some refits of one edit: a step is four passes of a model.

    The judge of each takes three passes of whole models over the text held out: the student's before and after it, and
    the teacher's. `windows` gives the calibration windows of so many tokens, which may be fewer; None = there are all.
    """
    passes = 0.0
    for refit in refits:
        asked = refit.tokens + refit.held_tokens
        read = asked if windows is None else min(asked, sum(batch.numel() for batch in windows(asked)))
        passes += read / asked * (refit.passes * asked + _JUDGED * refit.held_tokens)
    return passes / 4


def short_of(refit: Refit, windows: Sequence[Tensor]) -> list[str]:
    """A sentence where there is less text than a refit asks for: a whole window or more."""
    asked, read = refit.tokens + refit.held_tokens, sum(batch.numel() for batch in windows)
    if read > asked - windows[0].shape[1]:
        return []
    return [
        f"read {read:,} calibration tokens of {asked:,} asked for (tokens and held_tokens), as there are no more: "
        "give more calibration text (data.calibration_fraction)"
    ]


def split(windows: Sequence[Tensor], refit: Refit, ranks: Ranks) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """This rank's windows to fit to with their folds, and those held out, which lie evenly among all of them.

    What is in which fold does not depend on the number of processes.

    Raises ValueError where a rank would have no window of one of the two.
    """
    every = torch.cat(list(windows)) if windows else torch.empty(0, 2)
    share = refit.held_tokens / (refit.tokens + refit.held_tokens)
    number = min(len(every) - 1, max(ranks.size, round(len(every) * share)))
    name = refit.name()
    if every.shape[1] < 2:
        raise ValueError(
            f"refit.{name}: calibration windows of one token have no next token: raise data.seq_len to 2 or more"
        )
    if number < ranks.size or len(every) - number < ranks.size:
        raise ValueError(
            f"refit.{name}: {len(every)} calibration windows of {every.shape[1]} tokens for {ranks.size} processes, "
            f"some to fit to and some held out: raise refit.{name}.tokens and held_tokens to at least "
            f"{ranks.size * every.shape[1]} each (where schedule.refit_share or local_share says how much "
            "they read, that or schedule.tokens), or give more calibration text (data.calibration_fraction)"
        )
    held = torch.zeros(len(every), dtype=torch.bool)
    held[torch.arange(number) * len(every) // number] = True
    fit = every[~held]
    folds = max(1, min(refit.folds, len(fit) // ranks.size))
    rows = max(1, _BATCH // every.shape[1]) * ranks.size
    step = max(1, refit.step_tokens // every.shape[1]) if refit.step_tokens else rows
    batches = [(batch, fold) for fold in range(folds) for batch in in_batches(fit[fold::folds], step, ranks)]
    return [batch for batch, _ in batches], [fold for _, fold in batches], in_batches(every[held], rows, ranks)


def in_batches(windows: Tensor, rows: int, ranks: Ranks) -> list[Tensor]:
    """Windows [N, T] in batches of so many at most, or one for each rank; of each batch this rank's share.

    In shards a pass of a block is a collective: a rank with a batch more than the others would wait for them forever.
    So shares differ in size by a window instead.
    """
    batches = windows.tensor_split(min(-(-len(windows) // rows), len(windows) // ranks.size))
    return [batch[ranks.rank :: ranks.size] for batch in batches]


def _kl(task: RefitTask, expected: Streams) -> float:
    """Nats per token between teacher and student on the held-out windows of all ranks.

    `expected` are the teacher's states there, which are computed where they are missing.
    """
    batches = [{"input_ids": windows} for windows in task.held]
    kl = measure_quality(task.student, task.teacher, batches, expected)["kl"]
    sharding.reshard(task.student)  # after a pass the root is whole, and its parameters are not those of the optimizer
    return kl


def _weights(student: PreTrainedModel, modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The weights of some modules of the student, by their names there; in shards those that are here."""
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    return {
        name: sharding.local(parameter.detach()).cpu().clone()
        for name, parameter in student.named_parameters()
        if id(parameter) in held
    }


def _put_back(student: PreTrainedModel, kept: dict[str, Tensor]) -> None:
    for name, parameter in student.named_parameters():
        if name in kept:
            sharding.local(parameter.detach()).copy_(kept[name])
