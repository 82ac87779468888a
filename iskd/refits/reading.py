"""The calibration text of refits: how much each reads, which windows, and who reads them.

All refits that follow one edit read parts of one text, so that states of the teacher that one has kept are there for
the next (`iskd.teacher.states`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iskd.plan import Stage
from iskd.refits.base import Refit
from iskd.system import Ranks

_BATCH = 2048  # tokens of a process
_JUDGED = 3  # passes over the text held out
Windows = Callable[[int], Sequence[Tensor]]
"""Gives calibration windows [B, T] of so many tokens, the same on every rank."""


def for_stage(refits: Sequence[Refit], stage: Stage, window: int, ranks: Ranks, *, sharded: bool) -> list[Refit]:
    """The refits of a stage on as much text as it lets them read; none where that is nothing.

    Of a share each has a window to fit to and one to judge by for every process that reads, however little it has asked
    for.

    Args:
        refits: in order.
        stage: says how much they read.
        window: tokens of one.
        ranks: the processes that refit together.
        sharded: whether the student is in shards then.
    """
    share = stage.refit_share
    if stage.refit_budget and refits:
        share *= stage.refit_budget / training_tokens(refits)
    if share in (0, 1):
        return list(refits) if share else []
    return [refit.on(share, window * readers(refit, ranks, sharded=sharded).size) for refit in refits]


def texts_of(refits: Sequence[Refit], windows: Windows) -> list[list[Tensor]]:
    """The windows of every refit: those of the one that reads most, and of these so many as another one reads."""
    if not refits:
        return []  # and what is not read stands in no record
    asked = [refit.tokens + refit.held_tokens for refit in refits]
    whole = list(windows(max(asked)))
    if not whole or len({*asked}) < 2:
        return [whole for _ in refits]
    every = torch.cat(whole)
    counts = [min(len(every), max(1, tokens // every.shape[1])) for tokens in asked]
    return [whole if count == len(every) else [every[torch.arange(count) * len(every) // count]] for count in counts]


def readers(refit: Refit, ranks: Ranks, *, sharded: bool) -> Ranks:
    """The processes that share out a refit's windows: this one alone where they share out whole layers."""
    return Ranks() if refit.by_layers and not sharded else ranks


def training_tokens(refits: Sequence[Refit], windows: Callable[[int], Sequence[Tensor]] | None = None) -> float:
    """Training tokens that take about as long as some refits of one edit at most: a step is four passes of a model.

    The judge of each takes three passes of whole models over the text held out: the student's before and after it, and
    the teacher's. `windows` gives the calibration windows of so many tokens, which may be fewer; None = there are all.
    """
    passes = 0.0
    for refit, text in zip(refits, [None] * len(refits) if windows is None else texts_of(refits, windows), strict=True):
        asked = refit.tokens + refit.held_tokens
        read = asked if text is None else min(asked, sum(batch.numel() for batch in text))
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
