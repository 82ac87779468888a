"""What every schedule is asked, what it sees, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from iskd.plan import Record, Stage


@dataclass(frozen=True)
class History:
    """What has happened so far.

    Attributes:
        record: the edits applied.
        stages: finished stages, oldest first.
        scores: importance by surviving layer, higher = keep; None when none was asked for.
        params: parameters of the block at each surviving layer; None where nobody counted.
        other_params: parameters outside the blocks (embedding, final norm, head; a tied one counts once).
        pass_tokens: tokens of one pass over the training text; None where nobody counted.
        before: so many edits of the record were made before this schedule began, by another run or step.
    """

    record: Record
    stages: tuple[Stage, ...] = ()
    scores: Mapping[int, float] | None = field(default=None)
    params: Mapping[int, int] | None = field(default=None)
    other_params: int = 0
    pass_tokens: int | None = None
    before: int = 0

    @property
    def own(self) -> tuple[int, ...]:
        """Layers that this schedule has edited, ascending."""
        return tuple(sorted({edit.layer for edit in self.record.edits[self.before :]}))

    @property
    def foreign(self) -> tuple[int, ...]:
        """Layers that were edited before it began, ascending."""
        return tuple(sorted({edit.layer for edit in self.record.edits[: self.before]}))

    @property
    def untrained(self) -> int:
        """How many edits the latest stages have made that none has trained."""
        trained = max((number for number, stage in enumerate(self.stages, 1) if stage.tokens), default=0)
        return sum(len(stage.edits) for stage in self.stages[trained:])

    def after(self, stage: Stage) -> History:
        """The history once `stage` is kept: removed layers are gone, scores and the sizes of the others are as now."""
        record = self.record.extended(stage.edits)
        params = self.params and {layer: self.params[layer] for layer in record.layers}
        return replace(self, record=record, stages=(*self.stages, stage), params=params)


@dataclass(frozen=True)
class Choice:
    """What scores are asked for: a choice among some layers.

    Attributes:
        layers: those that may be edited next, ascending.
        number: how many of them, the lowest, are going to be edited on these scores.
        spare: how many of the next ones are tried as well (`candidates`).
    """

    layers: tuple[int, ...] = ()
    number: int = 0
    spare: int = 0


class Schedule(Protocol):
    """What comes next, as a pure function of the history: same history, same answers.

    Asked in this order, before the first stage and after every stage that was kept:

    1. `scoring`: `never`; or importance scores are needed, `once` in a run or for `each` stage anew. Where they are,
       a. `complete(history)`: no stage is left, so none are computed, and
       b. `choice(history)`: what they will decide on, which a race over the calibration windows goes by.
    2. `candidates_for(history)`, now with `history.scores`: the next stage. None listed: the run is complete. Several:
       each is healed for `trial_tokens` and the best is kept.

    The rest is read while a stage runs: `floor`, `restart_at_edit`; and `removes` before the run.

    A schedule's class says in `takes` what is passed to it beside the keys of its yaml: `edit`, the kind of edit
    (`iskd.schedules.edits`), and `seed` of the run; a class that does not say takes both.
    """

    @property
    def scoring(self) -> str:
        """When scores are computed: `never`, `once` or `each`."""

    @property
    def trial_tokens(self) -> int:
        """Training tokens that each of several candidates gets before one is kept."""

    @property
    def floor(self) -> float | None:
        """Retention, in (0, 1], below which a healed stage is rolled back and the run ends; None = no floor."""

    @property
    def removes(self) -> bool:
        """Whether edits leave fewer layers."""

    @property
    def restart_at_edit(self) -> bool:
        """Whether every edit is carried out in a fresh process."""

    def complete(self, history: History) -> bool:
        """Whether no stage is left; reads no scores, so that none are computed in vain."""

    def choice(self, history: History) -> Choice:
        """What the scores of `scoring` are needed for; read only while the run is not complete."""

    def candidates_for(self, history: History) -> list[Stage]:
        """Choices of the next stage that differ in one layer, the best first; none when the run is complete."""


def next_stages(schedule: Schedule, history: History) -> list[Stage]:
    """`candidates_for`, each with what was edited before it and not trained."""
    return [replace(stage, untrained=history.untrained) for stage in schedule.candidates_for(history)]


def next_stage(schedule: Schedule, history: History) -> Stage | None:
    """The schedule's best choice of the next stage; None when the run is complete."""
    return next(iter(next_stages(schedule, history)), None)
