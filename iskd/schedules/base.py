"""What schedules see and share.

A schedule is a plain class with `next_stage(history) -> Stage | None` (pure: same history, same stage), the attribute
`floor` (retention below which a healed stage is rolled back, or None) and `scoring` (`never`, `once`, `each`: when the
callback must fill `history.scores`) and `restart_at_edit` (every edit in a fresh process).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec, Stage


@dataclass(frozen=True)
class History:
    """What has happened so far.

    Attributes:
        record: the edits applied.
        stages: finished stages, oldest first.
        scores: importance by surviving layer, higher = keep; None when none was asked for.
    """

    record: Record
    stages: tuple[Stage, ...] = ()
    scores: Mapping[int, float] | None = field(default=None)


class Schedule(Protocol):
    """The contract of every schedule."""

    floor: float | None
    scoring: str
    restart_at_edit: bool

    def next_stage(self, history: History) -> Stage | None:
        """The next stage, or None when the run is complete."""


@dataclass(frozen=True)
class ReplaceWith:
    """Edits that put a compact block in. `fit`: fit it to the replaced block before training."""

    block: Spec
    fit: bool = True

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer; the seed of its fresh weights depends on run seed and layer only."""
        return Replace(layer, self.block, seed=seed * 10_007 + layer)


@dataclass(frozen=True)
class RemoveLayers:
    """Edits that take a layer out."""

    fit: bool = False

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer."""
        return Remove(layer)


@dataclass(frozen=True)
class ConvertTo:
    """Edits that exchange a block's attention for a mixer, which starts from the attention's own projections."""

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
