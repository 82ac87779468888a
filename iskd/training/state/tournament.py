"""The rank-flip guard: the best few candidates for a stage are each healed for a short budget, and one is kept.

A score taken before healing does not say which layer is missed least after it. Every trial starts from the same
weights, optimizer state and windows; what it trained is thrown away. They are judged on calibration windows, as many
as there are of validation: text that chooses layers must not be the text that is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iskd.plan import Stage, to_json
from iskd.plan.reading import stage_from_json
from iskd.system import Json


@dataclass(frozen=True)
class Tournament:
    """Where the trials for one stage stand.

    Attributes:
        candidates: the stages to choose from, best score first; at least two.
        tokens: training tokens of every trial.
        kl: divergence from the teacher after each trial so far, nats per token, in the candidates' order.
    """

    candidates: tuple[Stage, ...]
    tokens: int
    kl: tuple[float, ...] = ()

    @property
    def over(self) -> bool:
        """Whether every candidate had its trial."""
        return len(self.kl) == len(self.candidates)

    @property
    def stage(self) -> Stage:
        """The next trial; once all are over, the winner with its whole budget."""
        if self.over:
            return self.candidates[min(range(len(self.kl)), key=lambda index: (self.kl[index], index))]
        candidate = self.candidates[len(self.kl)]
        return dataclasses.replace(candidate, name=f"trial: {candidate.name}", tokens=self.tokens)

    def judged(self, kl: float) -> Tournament:
        """With the result of the trial that just ended."""
        return dataclasses.replace(self, kl=(*self.kl, kl))

    def verdict(self) -> str:
        """What was compared and who won, for the stage table."""
        trials = ", ".join(f"{stage.name} {kl:.4f}" for stage, kl in zip(self.candidates, self.kl, strict=True))
        flipped = "the first choice" if self.stage == self.candidates[0] else f"instead of {self.candidates[0].name}"
        return f"KL after {self.tokens} tokens of healing: {trials}; kept {self.stage.name}, {flipped}"

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {"candidates": [to_json(stage) for stage in self.candidates], "tokens": self.tokens, "kl": list(self.kl)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tournament:
        """Inverse of `to_json`. Raises ValueError when it cannot be read."""
        try:
            candidates = tuple(stage_from_json(stage) for stage in data["candidates"])
            kl = tuple(float(value) for value in data["kl"])
            tokens = data["tokens"]
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"the saved trials cannot be read: {error!r}") from error
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0 or len(candidates) < 2:
            raise ValueError(f"the saved trials have tokens={tokens!r:.80} and {len(candidates)} candidates")
        if len(kl) >= len(candidates):
            raise ValueError(f"the saved trials have {len(kl)} results for {len(candidates)} candidates")
        return cls(candidates, tokens, kl)
