"""The rank-flip guard: the best few candidates for a stage are each healed for a short budget, and one is kept.

A score taken before healing does not say which layer is missed least after it. Every trial starts from the same
weights, optimizer state and windows; what it trained is thrown away. They are judged on calibration windows, as many
as there are of validation: text that chooses layers must not be the text that is reported.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from iskd.plan import Stage, to_json
from iskd.system import Json
from iskd.system.faults import NonFiniteError
from iskd.system.reading import Count, Number


def _unfinished(kl: tuple[float, ...], read: ValidationInfo) -> tuple[float, ...]:
    if len(kl) >= len(read.data.get("candidates", kl)) > 0:
        raise ValueError("must have fewer numbers than there are candidates")
    return kl


@dataclass(frozen=True)
class Tournament:
    """Where the trials for one stage stand.

    Attributes:
        candidates: the stages to choose from, best score first; at least two.
        tokens: training tokens of every trial.
        kl: divergence from the teacher after each trial so far, nats per token, in the candidates' order.
    """

    candidates: Annotated[tuple[Stage, ...], Field(min_length=2)]
    tokens: Count
    kl: Annotated[tuple[Number, ...], AfterValidator(_unfinished)] = ()

    @property
    def over(self) -> bool:
        """Whether every candidate had its trial."""
        return len(self.kl) == len(self.candidates)

    @property
    def stage(self) -> Stage:
        """The next trial; once all are over, the winner with its whole budget."""
        if self.over:
            return self.candidates[min(range(len(self.kl)), key=self._place)]
        candidate = self.candidates[len(self.kl)]
        return dataclasses.replace(candidate, name=f"trial: {candidate.name}", tokens=self.tokens)

    def _place(self, index: int) -> tuple[bool, float, int]:
        """Best first, earlier before later; a student whose KL is no number loses against every other."""
        kl = self.kl[index]
        return (math.isnan(kl), 0.0 if math.isnan(kl) else kl, index)

    def judged(self, kl: float) -> Tournament:
        """With the result of the trial that just ended. Raises NonFiniteError when all are over and none has a KL."""
        judged = dataclasses.replace(self, kl=(*self.kl, kl))
        if judged.over and not any(map(math.isfinite, judged.kl)):
            tried = ", ".join(stage.name for stage in self.candidates)
            raise NonFiniteError(f"the KL from the teacher is not finite after any of the trials {tried}")
        return judged

    def verdict(self) -> str:
        """What was compared and who won, for the stage table."""
        trials = ", ".join(f"{stage.name} {kl:.4f}" for stage, kl in zip(self.candidates, self.kl, strict=True))
        flipped = "the first choice" if self.stage == self.candidates[0] else f"instead of {self.candidates[0].name}"
        return f"KL after {self.tokens} tokens of healing: {trials}; kept {self.stage.name}, {flipped}"

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {"candidates": [to_json(stage) for stage in self.candidates], "tokens": self.tokens, "kl": list(self.kl)}
