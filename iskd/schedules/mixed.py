"""Several schedules one after the other on one student: remove some layers, replace others, convert more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar

from pydantic import PositiveFloat

from iskd.plan import Convert, Stage
from iskd.schedules.base import Choice, History, Schedule
from iskd.schedules.edits import ConvertTo
from iskd.schedules.settings import Layers
from iskd.schedules.stages_ahead import forecast


@dataclass(frozen=True)
class Step:
    """A schedule of its own, and the parts that its stages go by.

    Attributes:
        schedule: which stages, with the edit of a layer.
        importance: scores layers where the schedule asks for it.
        refits: done to the survivors after every edit, in order.
    """

    schedule: Schedule
    importance: Any = None
    refits: Sequence[Any] = ()


@dataclass(frozen=True)
class Turn:
    """The step whose stage comes next.

    Attributes:
        number: of the step, from 0.
        step: itself.
        history: what its schedule sees: its own stages, and the record with all edits.
    """

    number: int
    step: Step
    history: History

    @property
    def begins(self) -> bool:
        """Whether the step has no stage yet, so that scores are those of another choice."""
        return not self.history.stages


@dataclass(frozen=True)
class Mixed:
    """A list of steps, each a schedule with its own edit, importance, refits and budget; the first one first.

    A step edits layers that no step before it has edited, unless its `layers` is a list. Scores, targets and budgets of
    a step are about its own edits; `target_layers` and `target_params` are of the whole student.

    Attributes:
        parts: the steps, made.
        steps: the same as they were written.
        tokens: training tokens of the run; steps that name none of their own share equally what is left of them.
        train, lora, lr, lr_new: as they were written for all steps that give none of their own, whose schedules have
            them by now.

    Source: none: the published edits one after the other, ours
    Needs: steps, e.g. `schedule.steps=[{edit: remove, count: 4}, {edit: replace, block: slim, count: 4}]`
    Costs: those of its steps
    Measured: not measured
    """

    takes: ClassVar[tuple[str, ...]] = ("parts",)
    trial_tokens: ClassVar[int] = 0
    floor: ClassVar[float | None] = None
    parts: Sequence[Step]
    steps: Sequence[Any] = field(default_factory=list)
    tokens: int | None = None
    train: str | None = None
    lora: Mapping[str, Any] | None = None
    lr: PositiveFloat | None = None
    lr_new: PositiveFloat | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.parts:
            raise ValueError(
                "schedule=mixed needs steps: e.g. schedule.steps=[{edit: remove, count: 4}, {edit: replace, block: "
                "slim, count: 4}, {edit: convert, mixer: gla, layers: every_second}]"
            )

    @property
    def scoring(self) -> str:
        """Whether any step asks for scores; which, and when, is the step's to say."""
        return "each" if any(part.schedule.scoring != "never" for part in self.parts) else "never"

    @property
    def removes(self) -> bool:
        """Whether edits leave fewer layers."""
        return any(part.schedule.removes for part in self.parts)

    @property
    def restart_at_edit(self) -> bool:
        """Whether every edit is carried out in a fresh process."""
        return any(part.schedule.restart_at_edit for part in self.parts)

    @property
    def stages(self) -> list[Stage]:
        """Stages that are known ahead: those of alignments."""
        return list(chain.from_iterable(getattr(part.schedule, "stages", ()) for part in self.parts))

    def turn(self, history: History) -> Turn | None:
        """The step whose stage comes next; None when all are done."""
        number = history.stages[-1].step if history.stages else 0
        while number < len(self.parts):
            seen = self._seen(history, number)
            if not self.parts[number].schedule.complete(seen):
                return Turn(number, self.parts[number], seen)
            number += 1
        return None

    def complete(self, history: History) -> bool:
        """Whether no step has a stage left."""
        return self.turn(history) is None

    def choice(self, history: History) -> Choice:
        """What the scores of the step in turn are needed for."""
        turn = self.turn(history)
        return Choice() if turn is None else turn.step.schedule.choice(turn.history)

    def candidates_for(self, history: History) -> list[Stage]:
        """The next stage of the step in turn, marked as its own.

        Where nobody has scored the layers yet, as in a plan of steps to come, the lower ones stand for those to be
        chosen.
        """
        turn = self.turn(history)
        if turn is None:
            return []
        seen, schedule = turn.history, turn.step.schedule
        if seen.scores is None and schedule.scoring != "never":
            seen = replace(seen, scores=dict.fromkeys(seen.record.layers, 0.0))
        return [replace(stage, step=turn.number) for stage in schedule.candidates_for(seen)]

    def _seen(self, history: History, number: int) -> History:
        own = tuple(stage for stage in history.stages if stage.step == number)
        edits = sum(len(stage.edits) for stage in own)
        return replace(history, stages=own, before=len(history.record.edits) - edits)


def parts_of(schedule: Schedule) -> Sequence[Step]:
    """The steps of a mixed schedule; any other one is its own only step."""
    return schedule.parts if isinstance(schedule, Mixed) else [Step(schedule)]


def turn_of(schedule: Schedule, importance: Any, history: History) -> Turn | None:
    """Which schedule decides next and by which scores; None when the run is complete."""
    if isinstance(schedule, Mixed):
        turn = schedule.turn(history)
        if turn is None or turn.step.importance is not None:
            return turn
        return replace(turn, step=replace(turn.step, importance=importance))
    return None if schedule.complete(history) else Turn(0, Step(schedule, importance), history)


def of_stage(schedule: Schedule, stage: Stage) -> Schedule:
    """The schedule that a stage comes from."""
    return parts_of(schedule)[stage.step].schedule


def refuse_in_vain(schedule: Schedule, history: History) -> None:
    """Raise ValueError where `edit.mixers` names layers that are not converted, as far as that is known at the start.

    Which layers scores choose is not: a mixer is then held against all that may be, and so is one of a step after them.
    """
    known = True
    for part in parts_of(schedule):
        each, seen = part.schedule, replace(history, stages=(), scores=None, before=len(history.record.edits))
        known = known and each.scoring == "never"
        if isinstance(each, Layers) and isinstance(each.edit, ConvertTo):
            chosen = each.chosen(seen) if known else None
            each.edit.check_used(each.may_edit(seen) if chosen is None else chosen)
        for stage in forecast(each, seen) if known else ():
            history = history.after(stage)


def possible(schedule: Schedule, history: History) -> Iterator[tuple[int, Convert]]:
    """Where scores choose the layers, one conversion for each entry of `edit.mixers` that they may choose; its step."""
    for number, each in enumerate(part.schedule for part in parts_of(schedule)):
        if isinstance(each, Layers) and isinstance(each.edit, ConvertTo) and each.scoring != "never":
            entries = {each.edit.entry_of(layer): layer for layer in each.may_edit(history)}
            yield from ((number, each.edit.make(layer, 0)) for entry, layer in entries.items() if entry is not None)


def in_vain(schedule: Schedule, history: History) -> str:
    """What is wrong where, by the scores of `history`, a mixer is named for layers of which none is chosen; else ""."""
    chosen = schedule.chosen(history) if isinstance(schedule, Layers) else None
    if isinstance(schedule, Layers) and isinstance(schedule.edit, ConvertTo) and chosen is not None:
        try:
            schedule.edit.check_used(chosen, all_listed=False)
        except ValueError as error:
            return str(error)
    return ""
