"""The calibration text that a run's edits are fitted to: its two parts, how much each refit reads, and who reads it.

One part is fitted to and the other one judges, and no window is in both, whoever reads how much of them: fits of
blocks, merges, refits, of this stage or another. A student looks far better on text that something of it was fitted to.
All refits that follow one edit read parts of one text, so that states of the teacher that one has kept are there for
the next (`iskd.teacher.states`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from iskd.plan import Stage
from iskd.refits.base import Refit
from iskd.system import Ranks

_BATCH = 2048  # tokens of a process
_CHOOSING = 4  # tokens of a fit for one that chooses
_JUDGED = 3  # passes over the text held out
Windows = Callable[[int], Sequence[Tensor]]
"""Gives calibration windows [B, T] of so many tokens, the same on every rank."""


def _no_windows() -> Tensor:
    return torch.empty(0, 2, dtype=torch.long)


@dataclass(frozen=True)
class Text:
    """Calibration windows to fit to and others to judge by, [N, T] each; none where nothing is given."""

    fit: Tensor = field(default_factory=_no_windows)
    held: Tensor = field(default_factory=_no_windows)

    def __bool__(self) -> bool:
        """Whether there is something to fit to."""
        return len(self.fit) > 0

    def few(self, tokens: int, held_tokens: int) -> Text:
        """Windows of so many tokens of each part, evenly spaced, one at least where there is one."""
        found = []
        for part, asked in ((self.fit, tokens), (self.held, held_tokens)):
            count = min(len(part), max(1, -(-asked // part.shape[1])))
            found.append(part if count == len(part) else part[torch.arange(count) * len(part) // count])
        return Text(*found)

    def not_fitted(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
        """Batches without the rows whose `input_ids` are fitted to; all of them where no others are left."""
        known = {window.numpy().tobytes() for window in self.fit}
        found = list[Mapping[str, Tensor]]()
        for batch in batches:
            rows = torch.tensor([window.cpu().numpy().tobytes() not in known for window in batch["input_ids"]])
            if bool(rows.any()):
                found.append({key: value[rows.to(value.device)] for key, value in batch.items()})
        return found or list(batches)

    @property
    def tokens(self) -> int:
        """Of both."""
        return self.fit.numel() + self.held.numel()


def divided(windows: Windows, tokens: int, held_tokens: int, least: int = 1) -> Text:
    """The text of all that is fitted in a run; what judges lies evenly in it, and no window of it is fitted to.

    Args:
        windows: gives it.
        tokens: to fit to, of whoever reads most.
        held_tokens: to judge by.
        least: windows that judge, as long as there is one more: one for every process.
    """
    given = list(windows(tokens + held_tokens)) if tokens else []
    if not given:
        return Text()
    every = torch.cat(given)
    number = min(len(every) - 1, max(least, round(len(every) * held_tokens / (tokens + held_tokens))))
    held = torch.zeros(len(every), dtype=torch.bool)
    held[torch.arange(number) * len(every) // max(1, number)] = True
    return Text(every[~held], every[held])


def text_of(refits: Sequence[Refit], fit_tokens: int, windows: Windows, window: int, processes: int) -> Text:
    """The text of a run: as much as whoever reads most asks for.

    Args:
        refits: of all stages.
        fit_tokens: that blocks are fitted to.
        windows: gives it.
        window: tokens of one.
        processes: that share out what refits read; of little text each has a window of either part.
    """
    least = window * processes if refits else 0
    tokens = max([fit_tokens, least, *(refit.tokens for refit in refits)])
    held = max([judging(fit_tokens), least, *(refit.held_tokens for refit in refits)])
    return divided(windows, tokens, held, processes if refits else 1)


def judging(fit_tokens: int) -> int:
    """Tokens that choose among fits of blocks, beside those that are fitted to."""
    return fit_tokens // _CHOOSING


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


def readers(refit: Refit, ranks: Ranks, *, sharded: bool) -> Ranks:
    """The processes that share out a refit's windows: this one alone where they share out whole layers."""
    return Ranks() if refit.by_layers and not sharded else ranks


def training_tokens(refits: Sequence[Refit], text: Text | None = None) -> float:
    """Training tokens that take about as long as some refits of one edit at most: a step is four passes of a model.

    The judge of each takes three passes of whole models over the text held out: the student's before and after it, and
    the teacher's. `text` is what there is, which may be less than they ask for; None = there is all.
    """
    passes = 0.0
    for refit in refits:
        asked = refit.tokens + refit.held_tokens
        read = asked if text is None else min(asked, text.few(refit.tokens, refit.held_tokens).tokens)
        passes += read / asked * (refit.passes * asked + _JUDGED * refit.held_tokens)
    return passes / 4


def short_of(refit: Refit, text: Text) -> list[str]:
    """A sentence where there is less text than a refit asks for: a whole window or more."""
    asked, read = refit.tokens + refit.held_tokens, text.few(refit.tokens, refit.held_tokens).tokens
    if read > asked - text.fit.shape[1]:
        return []
    return [
        f"read {read:,} calibration tokens of {asked:,} asked for (tokens and held_tokens), as there are no more: "
        "give more calibration text (data.calibration_fraction)"
    ]


def split(text: Text, refit: Refit, ranks: Ranks) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """This rank's windows to fit to with their folds, and those that judge, of what a refit reads.

    What is in which fold does not depend on the number of processes.

    Raises ValueError where a rank would have no window of one of the two.
    """
    text, name = text.few(refit.tokens, refit.held_tokens), refit.name()
    fit, length = text.fit, text.fit.shape[1]
    if length < 2:
        raise ValueError(
            f"refit.{name}: calibration windows of one token have no next token: raise data.seq_len to 2 or more"
        )
    if min(len(text.held), len(fit)) < ranks.size:
        raise ValueError(
            f"refit.{name}: {len(fit) + len(text.held)} calibration windows of {length} tokens for {ranks.size} "
            f"processes, some to fit to and some held out: raise refit.{name}.tokens and held_tokens to at least "
            f"{ranks.size * length} each (where schedule.refit_share or local_share says how much "
            "they read, that or schedule.tokens), or give more calibration text (data.calibration_fraction)"
        )
    folds = max(1, min(refit.folds, len(fit) // ranks.size))
    rows = max(1, _BATCH // length) * ranks.size
    step = max(1, refit.step_tokens // length) if refit.step_tokens else rows
    batches = [(batch, fold) for fold in range(folds) for batch in in_batches(fit[fold::folds], step, ranks)]
    return [batch for batch, _ in batches], [fold for _, fold in batches], in_batches(text.held, rows, ranks)


def in_batches(windows: Tensor, rows: int, ranks: Ranks) -> list[Tensor]:
    """Windows [N, T] in batches of so many at most, or one for each rank; of each batch this rank's share.

    In shards a pass of a block is a collective: a rank with a batch more than the others would wait for them forever.
    So shares differ in size by a window instead.
    """
    batches = windows.tensor_split(min(-(-len(windows) // rows), len(windows) // ranks.size))
    return [batch[ranks.rank :: ranks.size] for batch in batches]
