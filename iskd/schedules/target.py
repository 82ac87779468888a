"""When enough layers are edited: a number of edits, a depth, a size, or a share of layers that keep their attention."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from iskd.schedules.base import History


@dataclass(frozen=True)
class Target:
    """When enough layers are edited; exactly one of the four is given.

    Attributes:
        count: layers edited in all; -1 = every one that is not protected.
        layers: layers left in the student.
        params: parameters of the whole student, at or below which it is small enough.
        kept: share of the teacher's layers, in (0, 1), that are not edited; rounded up to whole layers.

    Raises:
        ValueError: none is given, more than one is, or one is out of its range.
    """

    count: int | None = None
    layers: int | None = None
    params: int | None = None
    kept: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        given = self._given()
        if len(given) > 1:
            one, other = list(given)[:2]
            raise ValueError(
                f"{one}={given[one]} and {other}={given[other]} are two targets; keep one: set {one}=null or "
                f"{other}=null"
            )
        if self.kept is not None:
            if not 0 < self.kept < 1:
                raise ValueError(
                    f"schedule.attention_share={self.kept} must be in (0, 1); to convert every layer leave it out"
                )
            return
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

    def _given(self) -> dict[str, float]:
        values: dict[str, float | None] = {
            "count": self.count,
            "target_layers": self.layers,
            "target_params": self.params,
            "attention_share": self.kept,
        }
        return {f"schedule.{key}": value for key, value in values.items() if value is not None}

    def reached(self, history: History, protected: Collection[int]) -> bool:
        """Whether nothing is left to edit. Raises ValueError when that is so before the first stage of a run."""
        record = history.record
        if self.count is not None or self.kept is not None:
            return len(history.own) >= self._count(history, protected)
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
        record, done = history.record, len(history.own)
        if self.params is not None:
            left = self._smallest(history, available, self.params)
        elif self.layers is not None:
            left = len(record.layers) - self.layers
        else:
            left = self._count(history, protected) - done
        if left > len(available):
            fewer = "raise schedule.attention_share" if self.kept is not None else "edit fewer"
            raise ValueError(
                f"{self}, but only {done + len(available)} layers may be edited (protected or left out: "
                f"{sorted(protected)}); {fewer}, or let more layers be edited"
            )
        return left

    def _count(self, history: History, protected: Collection[int]) -> int:
        depth = history.record.num_layers
        if self.kept is not None:
            whole = depth - len(history.foreign)  # what others edited keeps no attention of the teacher's
            count = whole - math.ceil(self.kept * depth - 1e-9)  # 0.28 * 25 is a little more than 7
            if count < 1:
                edited = f", {depth - whole} of which are edited otherwise," if whole < depth else ""
                raise ValueError(f"{self} of {depth} layers{edited} leaves none to convert: give a smaller share")
            return count
        free = set(range(depth)) - set(protected) - set(history.foreign)
        count = self.count if self.count and self.count > 0 else len(free)
        if not count:
            before = " or was edited before (a list in schedule.layers edits some again)" if history.foreign else ""
            raise ValueError(f"schedule.count=-1 and every layer is protected{before}: nothing would be edited")
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
