"""Edits and the record of them: what was changed in a student, as frozen JSON values."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from iskd.system import Json
from iskd.system.reading import Count, between

# What a file may ask for at most. A real plan stays far below; a forged one must not cost memory or hours.
MAX_LAYERS = 10_000
_MAX_TEXT = 10_000
_MAX_NAME = 256
_MAX_SIZE = 1_000_000
_MAX_VALUES = 1_000

# Only classes below these prefixes are ever imported by name from a record. A user who ships blocks of their own
# extends the list in code (`iskd.plan.allow("mypackage.blocks.")`), never from the file that is being read.
_ALLOWED: list[str] = ["iskd.blocks.", "iskd.mixers."]


def allow(prefix: str) -> None:
    """Let records name classes under `prefix` (a dotted package path that ends with a dot)."""
    if not prefix.endswith(".") or len(prefix) < 2:
        raise ValueError(
            f"allow({prefix!r}): give a dotted package path that ends with a dot, such as 'mypackage.blocks.'"
        )
    if prefix not in _ALLOWED:
        _ALLOWED.append(prefix)


def allowed() -> list[str]:
    """The prefixes below which records may name classes."""
    return list(_ALLOWED)


def _plain(kwargs: Json) -> Json:
    """Check that keyword arguments have a size that a block or mixer can mean."""
    level: list[Any] = [kwargs]
    count = 0
    while level:
        value = level.pop()
        count += 1
        if isinstance(value, dict):
            level += [*value, *value.values()]
            if any(len(key) > _MAX_NAME for key in value):
                raise ValueError(f"a key must be a string of at most {_MAX_NAME} characters")
        elif isinstance(value, list):
            level += value
        elif isinstance(value, (int, float)) and not abs(value) <= _MAX_SIZE:  # NaN is no smaller than anything
            raise ValueError(f"a number must be between -{_MAX_SIZE} and {_MAX_SIZE}, got {value!r:.80}")
        elif isinstance(value, str) and len(value) > _MAX_TEXT:
            raise ValueError(f"a value must be a string of at most {_MAX_TEXT} characters, got {value!r:.80}")
        if count > _MAX_VALUES:
            raise ValueError(f"it holds more than {_MAX_VALUES} values")
    return kwargs


@dataclass(frozen=True)
class Spec:
    """A part that is stamped once per layer: a dotted class path and its keyword arguments (plain JSON)."""

    target: Annotated[str, Field(max_length=_MAX_NAME)]
    kwargs: Annotated[Json, AfterValidator(_plain)] = field(default_factory=dict)

    def resolve(self) -> Callable[..., Any]:
        """Import the class. Raises ValueError outside the allow-list or when there is no such class."""
        if (
            not any(self.target.startswith(prefix) for prefix in _ALLOWED)
            or not self.target.replace(".", "_").isidentifier()
        ):
            raise ValueError(
                f"the record names {self.target!r}, which is outside the allow-list {_ALLOWED}. "
                "If you trust it, call iskd.plan.allow('its.package.') before loading."
            )
        module, _, name = self.target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"cannot import {self.target!r}: {error}. Is the version of iskd older than the record?"
            ) from error
        if not isinstance(found, type):
            raise ValueError(f"{self.target!r} is a {type(found).__name__}, not a class")
        # a module also holds what it imports: the list is about where a class is defined
        if not any(f"{found.__module__}.".startswith(prefix) for prefix in _ALLOWED):
            raise ValueError(
                f"{self.target!r} is defined in {found.__module__!r}, which is outside the allow-list {_ALLOWED}"
            )
        return found


Layer = Annotated[int, between(0, MAX_LAYERS - 1)]


@dataclass(frozen=True)
class Replace:
    """Put a compact block at `layer` (teacher's numbering). `seed` fixes its fresh weights on every rank alike."""

    layer: Layer
    block: Spec
    seed: Count = 0
    op: Literal["replace"] = "replace"


@dataclass(frozen=True)
class Remove:
    """Take the block at `layer` (teacher's numbering) out of the stack."""

    layer: Layer
    op: Literal["remove"] = "remove"


@dataclass(frozen=True)
class Merge:
    """Take the block at `layer` (teacher's numbering) out; the nearest block below takes over the best of both.

    To the structure it is a removal. `ridge`: how strongly the fit of the merged block holds on to inherited weights;
    None = as text that is held out says.
    """

    layer: Layer
    ridge: Annotated[float, Field(ge=0, le=_MAX_SIZE, allow_inf_nan=False)] | None = None
    op: Literal["merge"] = "merge"


@dataclass(frozen=True)
class Convert:
    """Exchange the mixer of the block at `layer` (teacher's numbering) and keep the rest of the block."""

    layer: Layer
    mixer: Spec
    seed: Count = 0
    op: Literal["convert"] = "convert"


Edit = Annotated[Replace | Remove | Merge | Convert, Field(discriminator="op")]

# the edits that leave fewer layers
REMOVALS = (Remove, Merge)
REMOVAL_OPS = tuple(kind.op for kind in REMOVALS)


@dataclass(frozen=True)
class Record:
    """The ordered edits that turn the teacher's skeleton (`num_layers` blocks) into the student.

    Raises:
        ValueError: an edit cannot be applied after those before it.
    """

    num_layers: Annotated[int, between(1, MAX_LAYERS)]
    # at most one edit of each kind per layer
    edits: Annotated[tuple[Edit, ...], Field(max_length=3 * MAX_LAYERS)] = ()

    def __post_init__(self) -> None:
        """Apply the edits to a list of layers."""
        left = dict.fromkeys(range(self.num_layers))
        done = set[tuple[str, int]]()
        for edit in self.edits:
            self._check(edit, left, done)
            if isinstance(edit, REMOVALS):
                del left[edit.layer]
            done.add((edit.op, edit.layer))

    @property
    def layers(self) -> tuple[int, ...]:
        """Surviving layers in stack order, in the teacher's numbering."""
        gone = {edit.layer for edit in self.edits if isinstance(edit, REMOVALS)}
        return tuple(layer for layer in range(self.num_layers) if layer not in gone)

    @property
    def edited(self) -> tuple[int, ...]:
        """Layers that were replaced, converted or removed so far, ascending."""
        return tuple(sorted({edit.layer for edit in self.edits}))

    def state_after(self, layer: int) -> int:
        """The teacher layer whose output the student's state after `layer` stands for.

        Across a gap of removed layers it is the last one of the gap (ILD, arXiv 2511.05085: the predecessor learns the
        removed layer).
        """
        survivors = set(self.layers)
        while layer + 1 < self.num_layers and layer + 1 not in survivors:
            layer += 1
        return layer

    def below(self, layer: int) -> int | None:
        """The nearest surviving layer below `layer`; None = there is none."""
        return max((found for found in self.layers if found < layer), default=None)

    def extended(self, edits: Iterable[Edit]) -> Record:
        """This record with `edits` appended, after checking that each can be applied."""
        return dataclasses.replace(self, edits=(*self.edits, *edits))

    def _check(self, edit: Edit, left: Collection[int], done: Collection[tuple[str, int]]) -> None:
        if not 0 <= edit.layer < self.num_layers:
            raise ValueError(f"{edit.op} {edit.layer}: the teacher has layers 0..{self.num_layers - 1}")
        if edit.layer not in left:
            raise ValueError(f"{edit.op} {edit.layer}: that layer was removed by an earlier edit; left are {[*left]}")
        if isinstance(edit, REMOVALS) and len(left) == 1:
            raise ValueError(f"{edit.op} {edit.layer}: it is the last layer; a student needs at least one")
        if isinstance(edit, Merge):
            _check_pair(edit.layer, max((layer for layer in left if layer < edit.layer), default=None), done)
        if isinstance(edit, Convert) and ("convert", edit.layer) in done:
            raise ValueError(f"convert {edit.layer}: its mixer was converted by an earlier edit; drop the second one")
        if isinstance(edit, Replace) and ("replace", edit.layer) in done:
            raise ValueError(f"replace {edit.layer}: it was replaced by an earlier edit; drop the second one")


def _check_pair(layer: int, below: int | None, done: Collection[tuple[str, int]]) -> None:
    """Raise ValueError unless the block at `layer` and the one below it can be merged."""
    if below is None:
        raise ValueError(
            f"merge {layer}: no layer is left below it that could take it over; remove it (edit=remove), or protect it "
            "(schedule.protect_first=1)"
        )
    for op, edited in sorted(done):
        if op in ("replace", "convert") and edited in (layer, below):
            raise ValueError(
                f"merge {layer} into {below}: only blocks of the teacher's own make can be merged, and there was "
                f"{op} {edited} before; remove the layer (edit=remove), or merge first"
            )


def describe(edits: Iterable[Edit]) -> str:
    """Short label of some edits: `replace 3, 5; remove 7`, or `heal` when there is none."""
    groups: dict[str, list[int]] = {}
    for edit in edits:
        groups.setdefault(edit.op, []).append(edit.layer)
    return "; ".join(f"{op} {', '.join(map(str, layers))}" for op, layers in groups.items()) or "heal"
