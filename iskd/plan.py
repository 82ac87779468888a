"""What a run does, as data: specs, edits, stages and the record. Frozen values and JSON, no torch.

Everything that must survive a checkpoint or travel between ranks lives here, so that a student can be rebuilt
from a file without Hydra and a decision can be printed before anything is changed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

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


@dataclass(frozen=True)
class Spec:
    """A part that is stamped once per layer: a dotted class path and its keyword arguments (plain JSON)."""

    target: str
    kwargs: Json = field(default_factory=dict)

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


@dataclass(frozen=True)
class Replace:
    """Put a compact block at `layer` (teacher's numbering). `seed` fixes its fresh weights on every rank alike."""

    layer: int
    block: Spec
    seed: int = 0
    op: str = "replace"


@dataclass(frozen=True)
class Remove:
    """Take the block at `layer` (teacher's numbering) out of the stack."""

    layer: int
    op: str = "remove"


@dataclass(frozen=True)
class Convert:
    """Exchange the mixer of the block at `layer` (teacher's numbering) and keep the rest of the block."""

    layer: int
    mixer: Spec
    seed: int = 0
    op: str = "convert"


Edit = Replace | Remove | Convert
_EDITS: dict[str, type[Replace] | type[Remove] | type[Convert]] = {
    "replace": Replace,
    "remove": Remove,
    "convert": Convert,
}


@dataclass(frozen=True)
class Record:
    """The ordered edits that turn the teacher's skeleton (`num_layers` blocks) into the student."""

    num_layers: int
    edits: tuple[Edit, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Surviving layers in stack order, in the teacher's numbering."""
        gone = {edit.layer for edit in self.edits if isinstance(edit, Remove)}
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

    def extended(self, edits: Iterable[Edit]) -> Record:
        """This record with `edits` appended, after checking that each can be applied."""
        record = self
        for edit in edits:
            record._check(edit)
            record = dataclasses.replace(record, edits=(*record.edits, edit))
        return record

    def _check(self, edit: Edit) -> None:
        if not 0 <= edit.layer < self.num_layers:
            raise ValueError(f"{edit.op} {edit.layer}: the teacher has layers 0..{self.num_layers - 1}")
        if edit.layer not in self.layers:
            raise ValueError(
                f"{edit.op} {edit.layer}: that layer was removed by an earlier edit; left are {list(self.layers)}"
            )
        if isinstance(edit, Remove) and len(self.layers) == 1:
            raise ValueError(f"remove {edit.layer}: it is the last layer; a student needs at least one")
        if isinstance(edit, Convert) and any(isinstance(e, Convert) and e.layer == edit.layer for e in self.edits):
            raise ValueError(f"convert {edit.layer}: its mixer was converted by an earlier edit; drop the second one")
        if isinstance(edit, Replace) and any(isinstance(e, Replace) and e.layer == edit.layer for e in self.edits):
            raise ValueError(f"replace {edit.layer}: it was replaced by an earlier edit; drop the second one")


@dataclass(frozen=True)
class Stage:
    """Edits, what trains and how fast, and a budget.

    Attributes:
        name: label in logs, tables and plots.
        edits: applied in order at the start of the stage.
        tokens: training tokens of this stage over all ranks (0 = edit only).
        train: which parameters train: `all`, `edited` (every edited layer so far), `new` (this stage's edits),
            `adjacent` (this stage's edits and the surviving neighbours), or a regular expression on parameter names.
        lr: learning rate of everything that trains but the new blocks.
        lr_new: learning rate of the blocks that this stage inserts.
        fit: fit the inserted blocks to the replaced ones on calibration tokens before training.
    """

    name: str
    edits: tuple[Edit, ...] = ()
    tokens: int = 0
    train: str = "all"
    lr: float = 1e-4
    lr_new: float = 3e-4
    fit: bool = True


def to_json(value: Spec | Edit | Record | Stage) -> Json:
    """Plain JSON of any value of this module."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def _fields(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__}: expected an object, got {type(data).__name__}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown key {unknown[0]!r}; known are {sorted(known)}")
    missing = [
        n
        for n, f in known.items()
        if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{cls.__name__}: key {missing[0]!r} is missing")
    return dict(data)


def spec_from_json(data: Mapping[str, Any]) -> Spec:
    """Read a Spec; the class is not imported yet."""
    values = _fields(Spec, data)
    if not isinstance(values["target"], str) or not isinstance(values.get("kwargs", {}), dict):
        raise ValueError("Spec: target must be a string and kwargs an object")
    return Spec(**values)


def edit_from_json(data: Mapping[str, Any]) -> Edit:
    """Read one edit. Raises ValueError on an unknown `op`, an unknown key or a value of the wrong type."""
    op = data.get("op") if isinstance(data, Mapping) else None
    if not isinstance(op, str) or op not in _EDITS:
        raise ValueError(f"edit: unknown op {op!r}; known are {sorted(_EDITS)}")
    cls = _EDITS[op]
    values = _fields(cls, data)
    for key in ("layer", "seed"):
        if key in values and (not isinstance(values[key], int) or isinstance(values[key], bool)):
            raise ValueError(f"{op}: {key} must be an integer, got {values[key]!r}")
    for key in ("block", "mixer"):
        if key in values:
            values[key] = spec_from_json(values[key])
    return cls(**values)


def record_from_json(data: Mapping[str, Any]) -> Record:
    """Read a record and check that its edits can be applied in order."""
    values = _fields(Record, data)
    count = values["num_layers"]
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 10_000:
        raise ValueError(f"Record: num_layers must be between 1 and 10000, got {count!r}")
    if not isinstance(values.get("edits", []), list):
        raise ValueError("Record: edits must be a list")
    return Record(count).extended(edit_from_json(edit) for edit in values.get("edits", []))


def stage_from_json(data: Mapping[str, Any]) -> Stage:
    """Read a stage."""
    values = _fields(Stage, data)
    values["edits"] = tuple(edit_from_json(edit) for edit in values.get("edits", []))
    return Stage(**values)


def describe(edits: Iterable[Edit]) -> str:
    """Short label of some edits: `replace 3, 5; remove 7`, or `heal` when there is none."""
    groups: dict[str, list[int]] = {}
    for edit in edits:
        groups.setdefault(edit.op, []).append(edit.layer)
    return "; ".join(f"{op} {', '.join(map(str, layers))}" for op, layers in groups.items()) or "heal"
