"""The calibration text of a budget in three parts: to fit options to, to judge their fits, to score students."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iskd.refits.local import Local
from iskd.schedules.budget.settings import Budget

_BATCH = 1024  # tokens that are read together
_SEED = 20


@dataclass(frozen=True)
class Texts:
    """Windows in batches, [B, T] each; no window is in two of the three.

    Attributes:
        fit: options are fitted to them; a batch is a step of training.
        held: they choose among fits and end training.
        score: students are compared on them, one window at a time.
    """

    fit: list[Tensor]
    held: list[Tensor]
    score: list[Tensor]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the tokens and of their parts."""
        found = hashlib.sha256()
        for part in (self.fit, self.held, self.score):
            for batch in part:
                found.update(str(list(batch.shape)).encode() + batch.cpu().numpy().astype("<u4").tobytes())
            found.update(b"|")
        return found.hexdigest()

    def short_of(self, budget: Budget) -> list[str]:
        """Sentences on less text than was asked for; none where only whole windows make the difference."""
        asked = budget.fit_tokens + budget.held_tokens + budget.score_tokens
        fit, held, score = (sum(batch.numel() for batch in part) for part in (self.fit, self.held, self.score))
        if fit + held + score + 3 * self.fit[0].shape[1] > asked:
            return []
        return [
            f"the calibration text has {fit + held + score:,} tokens of the {asked:,} that the budget asks for: options"
            f" are fitted to {fit:,}, judged by {held:,} and scored on {score:,}; give more (data.calibration_fraction)"
        ]

    def to(self, device: torch.device) -> Texts:
        """The same on a device."""
        parts = ([batch.to(device) for batch in part] for part in (self.fit, self.held, self.score))
        return Texts(*parts)


def texts_of(budget: Budget, windows: Callable[[int], Sequence[Tensor]]) -> Texts:
    """The three parts, drawn from windows that lie evenly over the calibration text; the same on every process.

    Args:
        budget: how many tokens each has.
        windows: gives calibration windows [B, T] of so many tokens, fewer where there is less text.

    Raises:
        ValueError: there are fewer than three windows, or they have one token.
    """
    asked = (budget.fit_tokens, budget.held_tokens, budget.score_tokens)
    found = list(windows(sum(asked)))
    every = torch.cat(found) if found else torch.empty(0, 2, dtype=torch.long)
    count, length = every.shape
    if length < 2:
        raise ValueError("budget: calibration windows of one token have no next token: raise data.seq_len to 2 or more")
    if count < 3:
        raise ValueError(
            f"budget: {count} calibration windows of {length} tokens, and one each is needed to fit options to, to "
            f"judge the fits and to score students: raise budget.fit_tokens, held_tokens and score_tokens to {length} "
            "at least, or give more calibration text (data.calibration_fraction)"
        )
    held, score = (min(max(1, round(count * share / sum(asked))), (count - 1) // 2) for share in asked[1:])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))
    parts = order[held + score :].sort().values, order[:held].sort().values, order[held : held + score].sort().values
    step, rows = (max(1, tokens // length) for tokens in (Local.step_tokens, _BATCH))
    return Texts(list(every[parts[0]].split(step)), list(every[parts[1]].split(rows)), list(every[parts[2]].split(1)))
