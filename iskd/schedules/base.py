"""What schedules see and share.

A schedule is a plain class with `next_stage(history) -> Stage | None` (pure: same history, same stage), the attribute
`floor` (retention below which a healed stage is rolled back, or None) and `scoring` (`never`, `once`, `each`: when the
callback must fill `history.scores`), `removes` (whether edits leave fewer layers) and `restart_at_edit` (every edit in
a fresh process). `candidates_for` lists the best few choices of the next stage, each of which may be tried for
`trial_tokens` before one is kept; `choice` says what the scores for it are needed for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec, Stage


@dataclass(frozen=True)
class History:
    """What has happened so far.

    Attributes:
        record: the edits applied.
        stages: finished stages, oldest first.
        scores: importance by surviving layer, higher = keep; None when none was asked for.
        params: parameters of the block at each surviving layer; None where nobody counted.
        other_params: parameters outside the blocks (embedding, final norm, head; a tied one counts once).
    """

    record: Record
    stages: tuple[Stage, ...] = ()
    scores: Mapping[int, float] | None = field(default=None)
    params: Mapping[int, int] | None = field(default=None)
    other_params: int = 0

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
    """The contract of every schedule."""

    floor: float | None
    scoring: str
    removes: bool
    restart_at_edit: bool
    candidates: int
    trial_tokens: int

    def complete(self, history: History) -> bool:
        """Whether no stage is left; reads no scores, so that none are computed in vain."""

    def choice(self, history: History) -> Choice:
        """What the scores of `scoring` are needed for; read only while the run is not complete."""

    def candidates_for(self, history: History) -> list[Stage]:
        """At most `candidates` stages that differ in one layer, the best first; none when the run is complete."""

    def next_stage(self, history: History) -> Stage | None:
        """The first of `candidates_for`, or None when the run is complete."""


@dataclass(frozen=True)
class ReplaceWith:
    """Edits that put a compact block in. `fit`: fit it to the replaced block before training.

    Source: ISKD (COLING 2025, 2025.coling-main.440)
    Needs: a block (`block=`)
    Costs: a fit for every layer with `edit.fit`
    Measured: KL 0.73, 30 % of the block parameters out (experiments/iskd-smollm2/README.md)
    """

    block: Spec
    fit: bool = True

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer; the seed of its fresh weights depends on run seed and layer only."""
        return Replace(layer, self.block, seed=seed * 10_007 + layer)


@dataclass(frozen=True)
class RemoveLayers:
    """Edits that take a layer out.

    Source: ShortGPT (arXiv 2403.03853), ILD (arXiv 2511.05085)
    Needs: an importance, or an order
    Costs: nothing; the cache of the layer goes with it
    Measured: KL 0.53 at 23 layers of 30, 0.72 at 20 (experiments/ild-smollm2/README.md)
    """

    fit: bool = False

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer."""
        return Remove(layer)


@dataclass(frozen=True)
class ConvertTo:
    """Edits that exchange a block's attention for a mixer, which starts from the attention's own projections.

    Source: arXiv 2504.14366
    Needs: a mixer (`mixer=`)
    Costs: that of the mixer; a state of constant size instead of a cache that grows
    Measured: 70.8 % of the teacher's accuracy, all of SmolLM2-135M converted
        (experiments/subquadratic-smollm2/README.md)
    """

    mixer: Spec
    fit: bool = False

    def __post_init__(self) -> None:
        """Refuse a fit, which would silently do nothing."""
        if self.fit:
            raise ValueError("edit.fit=true: mixers have no fit before training; set edit.fit=false")

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer; the seed of its fresh weights depends on run seed and layer only."""
        return Convert(layer, self.mixer, seed=seed * 10_007 + layer)


EditKind = ReplaceWith | RemoveLayers | ConvertTo


@dataclass(frozen=True)
class Target:
    """When enough layers are edited; exactly one of the three is given.

    Attributes:
        count: layers edited in all; -1 = every one that is not protected.
        layers: layers left in the student.
        params: parameters of the whole student, at or below which it is small enough.

    Raises:
        ValueError: none is given, more than one is, or one is not positive.
    """

    count: int | None = None
    layers: int | None = None
    params: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        given = self._given()
        if len(given) > 1:
            one, other = list(given)[:2]
            raise ValueError(
                f"{one}={given[one]} and {other}={given[other]} are two targets; keep one: set {one}=null or "
                f"{other}=null"
            )
        key, value = next(iter(given.items()), ("schedule.count", None))
        if key == "schedule.count" and (not value or (value < 1 and value != -1)):
            raise ValueError(
                f"schedule.count={value}: nothing would be edited; give at least 1 (-1 = all), or use schedule=none"
            )
        if key != "schedule.count" and (not value or value < 1):
            raise ValueError(f"{self} must be at least 1: a student needs a layer")

    def __str__(self) -> str:
        """The key and its value, for messages."""
        return ", ".join(f"{key}={value}" for key, value in self._given().items())

    def _given(self) -> dict[str, int]:
        values = {"count": self.count, "target_layers": self.layers, "target_params": self.params}
        return {f"schedule.{key}": value for key, value in values.items() if value is not None}

    def reached(self, history: History, protected: Collection[int]) -> bool:
        """Whether nothing is left to edit. Raises ValueError when that is so before the first stage of a run."""
        record = history.record
        if self.count is not None:
            return len(record.edited) >= self._count(record, protected)
        size, unit = (len(record.layers), "layers") if self.layers is not None else (self._size(history), "parameters")
        goal = self.layers or self.params or 0
        if size <= goal and not history.stages:
            raise ValueError(
                f"{self}: the model has only {size:,} {unit}, so nothing would be removed; choose fewer, "
                "or use schedule=none"
            )
        return size <= goal

    def left(self, history: History, available: Sequence[int], protected: Collection[int]) -> int:
        """How many layers are still to be edited, if they are taken from `available` in its order.

        Raises ValueError when there are too few.
        """
        record, done = history.record, len(history.record.edited)
        if self.params is not None:
            left = self._smallest(history, available, self.params)
        elif self.layers is not None:
            left = len(record.layers) - self.layers
        else:
            left = self._count(record, protected) - done
        if left > len(available):
            raise ValueError(
                f"{self}, but only {done + len(available)} layers may be edited (protected: {sorted(protected)}); "
                "edit fewer or protect fewer"
            )
        return left

    def _count(self, record: Record, protected: Collection[int]) -> int:
        count = self.count if self.count and self.count > 0 else record.num_layers - len(protected)
        if not count:
            raise ValueError("schedule.count=-1 and every layer is protected: nothing would be edited")
        return count

    def _size(self, history: History) -> int:
        if history.params is None:
            raise ValueError(
                f"{self} needs the sizes of the blocks, and whoever runs this schedule gives none (History.params); "
                "use schedule.target_layers or schedule.count"
            )
        return history.other_params + sum(history.params.values())

    def _smallest(self, history: History, available: Sequence[int], goal: int) -> int:
        size = self._size(history)
        assert history.params is not None
        # a student keeps at least one layer
        for number, layer in enumerate(available[: len(history.record.layers) - 1], 1):
            size -= history.params[layer]
            if size <= goal:
                return number
        raise ValueError(
            f"{self} cannot be reached: {size:,} parameters are left when all layers that may be removed are gone, "
            f"{history.other_params:,} of them outside the blocks; choose more, or protect fewer layers"
        )


def check_floor(floor: float | None) -> float | None:
    """A retention floor in (0, 1], or None."""
    if floor is not None and not 0 < floor <= 1:
        raise ValueError(f"schedule.floor must be in (0, 1] (student's score / teacher's score), got {floor}")
    return floor


def check_layers(layers: Sequence[int], record: Record, key: str = "layers") -> list[int]:
    """Layers of `schedule.<key>` as given, after checking that each exists once."""
    for layer in layers:
        if not 0 <= layer < record.num_layers:
            raise ValueError(f"schedule.{key} names layer {layer}; the teacher has layers 0..{record.num_layers - 1}")
    twice = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if twice:
        raise ValueError(f"schedule.{key} lists layer {twice[0]} twice; name each layer once")
    return list(layers)
