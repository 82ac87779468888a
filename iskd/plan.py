"""What a run does, as data: specs, edits, stages and the record. Frozen values and JSON, no torch.

Everything that must survive a checkpoint or travel between ranks lives here, so that a student can be rebuilt
from a file without Hydra and a decision can be printed before anything is changed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iskd.lora_spec import LoraSpec

Json = dict[str, Any]

# What a file may ask for at most. A real plan stays far below; a forged one must not cost memory or hours.
MAX_LAYERS = 10_000
MAX_NUMBER = 2**63 - 1
_MAX_DEPTH = 32
_MAX_TEXT = 10_000
_MAX_NAME = 256
_MAX_SIZE = 1_000_000
_MAX_VALUES = 1_000
_MAX_WAYS = 500_000
TRAIN = ("all", "edited", "new", "adjacent", "lora")
OBJECTIVES = ("loss", "matrix", "mixer_output", "hidden")
SHAPES = ("", "constant", "linear", "cosine", "wsd")

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
        left = dict.fromkeys(self.layers)
        done = {(edit.op, edit.layer) for edit in self.edits}
        found = list(self.edits)
        for edit in edits:
            self._check(edit, left, done)
            if isinstance(edit, Remove):
                del left[edit.layer]
            done.add((edit.op, edit.layer))
            found.append(edit)
        return dataclasses.replace(self, edits=tuple(found))

    def _check(self, edit: Edit, left: Collection[int], done: Collection[tuple[str, int]]) -> None:
        if not 0 <= edit.layer < self.num_layers:
            raise ValueError(f"{edit.op} {edit.layer}: the teacher has layers 0..{self.num_layers - 1}")
        if edit.layer not in left:
            raise ValueError(f"{edit.op} {edit.layer}: that layer was removed by an earlier edit; left are {[*left]}")
        if isinstance(edit, Remove) and len(left) == 1:
            raise ValueError(f"remove {edit.layer}: it is the last layer; a student needs at least one")
        if isinstance(edit, Convert) and ("convert", edit.layer) in done:
            raise ValueError(f"convert {edit.layer}: its mixer was converted by an earlier edit; drop the second one")
        if isinstance(edit, Replace) and ("replace", edit.layer) in done:
            raise ValueError(f"replace {edit.layer}: it was replaced by an earlier edit; drop the second one")


@dataclass(frozen=True)
class Stage:
    """Edits, what trains and how fast, and a budget.

    Attributes:
        name: label in logs, tables and plots.
        edits: applied in order at the start of the stage.
        tokens: training tokens of this stage over all ranks (0 = edit only).
        train: which parameters train: `all`, `edited` (every edited layer so far), `new` (this stage's edits),
            `adjacent` (this stage's edits and the surviving neighbours), `lora` (adapters of low rank, merged at the
            end of the stage, and this stage's new blocks), or a regular expression on parameter names.
        lr: learning rate of everything that trains but the new blocks.
        lr_new: learning rate of the blocks and mixers that this stage inserts.
        fit: fit the inserted blocks to the replaced ones on calibration tokens before training.
        lora: the adapters of `train=lora`.
        objective: what training minimises: the configured `loss` terms, or layer by layer on the teacher's own inputs
            (`iskd.align`) the distance of mixing `matrix`, `mixer_output` or the block's `hidden` output.
        shape: how the rates of this stage fall, see `iskd.optim.OptimSpec.decay`; "" = as configured there.
    """

    name: str
    edits: tuple[Edit, ...] = ()
    tokens: int = 0
    train: str = "all"
    lr: float = 1e-4
    lr_new: float = 3e-4
    fit: bool = True
    lora: LoraSpec = field(default_factory=LoraSpec)
    objective: str = "loss"
    shape: str = ""


def to_json(value: Spec | Edit | Record | Stage) -> Json:
    """Plain JSON of any value of this module."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def read_json(path: Path, *, max_bytes: int = 16 << 20) -> Any:
    """Read a JSON file that anybody may have written. Values that are not finite pass: whoever needs numbers checks.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no plain file, larger than `max_bytes`, not UTF-8, not JSON, names a key twice in one object,
            or nests deeper than 32 levels.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a plain file: put the file itself in its place")
    if found.st_size > max_bytes:
        raise ValueError(f"{path} has {found.st_size} bytes, more than the {max_bytes} that such a file may have")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error!s:.200}): restore it from a copy") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        values = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [inner for each in values for inner in each if isinstance(inner, (dict, list))]
        if not level:
            return value
    raise ValueError(f"{path} is nested deeper than {_MAX_DEPTH} levels: it is not a file that iskd wrote")


def _once_each(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r:.80} stands twice in one object")
    return found


def _fields(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__}: expected an object, got {type(data).__name__}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown key {unknown[0]!r:.80}; known are {sorted(known)}")
    missing = [
        n
        for n, f in known.items()
        if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{cls.__name__}: key {missing[0]!r} is missing")
    return dict(data)


def _integer(value: Any, where: str, low: int = 0, high: int = MAX_NUMBER) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where} must be an integer, got {value!r:.80}")
    if not low <= value <= high:
        raise ValueError(f"{where} must be between {low} and {high}, got {value!r:.80}")
    return value


def _text(value: Any, where: str, longest: int) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f"{where} must be a string of at most {longest} characters, got {value!r:.80}")
    return value


def _plain(kwargs: Json, where: str) -> None:
    """Check that keyword arguments are plain JSON of a size that a block or mixer can mean."""
    level: list[Any] = [kwargs]
    count = 0
    while level:
        value = level.pop()
        count += 1
        if isinstance(value, dict):
            level += [*(_text(key, f"{where}: a key of kwargs", _MAX_NAME) for key in value), *value.values()]
        elif isinstance(value, list):
            level += value
        elif isinstance(value, (int, float)) and not abs(value) <= _MAX_SIZE:  # NaN is no smaller than anything
            raise ValueError(
                f"{where}: a number in kwargs must be between -{_MAX_SIZE} and {_MAX_SIZE}, got {value!r:.80}"
            )
        elif isinstance(value, str):
            _text(value, f"{where}: a value in kwargs", _MAX_TEXT)
        elif value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{where}: kwargs must be plain JSON, got {value!r:.80}")
        if count > _MAX_VALUES:
            raise ValueError(f"{where}: kwargs hold more than {_MAX_VALUES} values")


def spec_from_json(data: Mapping[str, Any]) -> Spec:
    """Read a Spec; the class is not imported yet. Raises ValueError on kwargs that are not plain JSON, or too large."""
    values = _fields(Spec, data)
    if not isinstance(values["target"], str) or not isinstance(values.get("kwargs", {}), dict):
        raise ValueError("Spec: target must be a string and kwargs an object")
    target = _text(values["target"], "Spec: target", _MAX_NAME)
    _plain(values.get("kwargs", {}), f"Spec {target!r}")
    return Spec(**values)


def edit_from_json(data: Mapping[str, Any]) -> Edit:
    """Read one edit. Raises ValueError on an unknown `op`, an unknown key or a value of the wrong type."""
    op = data.get("op") if isinstance(data, Mapping) else None
    if not isinstance(op, str) or op not in _EDITS:
        raise ValueError(f"edit: unknown op {op!r:.80}; known are {sorted(_EDITS)}")
    cls = _EDITS[op]
    values = _fields(cls, data)
    _integer(values["layer"], f"{op}: layer", high=MAX_LAYERS - 1)
    _integer(values.get("seed", 0), f"{op}: seed")
    for key in ("block", "mixer"):
        if key in values:
            values[key] = spec_from_json(values[key])
    return cls(**values)


def record_from_json(data: Mapping[str, Any]) -> Record:
    """Read a record and check that its edits can be applied in order."""
    values = _fields(Record, data)
    count = _integer(values["num_layers"], "Record: num_layers", 1, MAX_LAYERS)
    return Record(count).extended(map(edit_from_json, _edits(values, "Record")))


def stage_from_json(data: Mapping[str, Any]) -> Stage:
    """Read a stage. Raises ValueError on an unknown key, a value of the wrong type or a rate that is not finite."""
    values = _fields(Stage, data)
    where = f"Stage {_text(values['name'], 'Stage: name', _MAX_TEXT)!r:.80}"
    tokens = values.get("tokens", 0)
    # a budget written as 1e6 is a float in YAML and in JSON
    whole = isinstance(tokens, float) and tokens.is_integer()
    values["tokens"] = _integer(int(tokens) if whole else tokens, f"{where}: tokens")
    for key in ("lr", "lr_new"):
        rate = values.get(key, 0.0)
        # the bound comes before isfinite, which an integer of a thousand digits would overflow
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= MAX_NUMBER:
            raise ValueError(f"{where}: {key} must be a finite number >= 0, got {rate!r:.80}")
    if not isinstance(values.get("fit", True), bool):
        raise ValueError(f"{where}: fit must be true or false, got {values['fit']!r:.80}")
    if _text(values.get("train", "all"), f"{where}: train", _MAX_NAME) not in TRAIN:
        _pattern(values.get("train", "all"), f"{where}: train")
    for key, known in (("objective", OBJECTIVES), ("shape", SHAPES)):
        if _text(values.get(key, known[0]), f"{where}: {key}", _MAX_NAME) not in known:
            raise ValueError(f"{where}: {key} must be one of {known}, got {values[key]!r:.80}")
    values["edits"] = tuple(map(edit_from_json, _edits(values, where)))
    values["lora"] = LoraSpec.of(values.get("lora", {}))
    return Stage(**values)


def _edits(values: Json, where: str) -> list[Any]:
    found = values.get("edits", [])
    if not isinstance(found, list) or len(found) > len(_EDITS) * MAX_LAYERS:
        raise ValueError(f"{where}: edits must be a list with at most one edit of each kind per layer")
    return found


def _pattern(text: str, where: str) -> None:
    """Check a regular expression, and that trying it on a parameter name ends soon.

    Matching tries every way of splitting a name among repeats and alternatives, so their number is bounded: about 50
    positions for a repeat, 2 for an optional part, the branches of each group. A repeated group has no such bound.
    """
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{where}={text!r:.80} is neither {'/'.join(TRAIN)} nor a regular expression: {error}"
        ) from None
    simple = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "a", text, flags=re.DOTALL)
    groups = re.sub(r"\(\?", "(", simple)
    ways = 50 ** len(re.findall(r"[*+{]", groups)) * 2 ** groups.count("?")
    ways *= math.prod(part.count("|") + 1 for part in groups.split("("))
    if ways > _MAX_WAYS or re.search(r"\)[*+{]", groups):
        raise ValueError(
            f"{where}={text!r:.80} could take hours to match: use at most three of * + {{, and none of them on a group"
        )


def describe(edits: Iterable[Edit]) -> str:
    """Short label of some edits: `replace 3, 5; remove 7`, or `heal` when there is none."""
    groups: dict[str, list[int]] = {}
    for edit in edits:
        groups.setdefault(edit.op, []).append(edit.layer)
    return "; ".join(f"{op} {', '.join(map(str, layers))}" for op, layers in groups.items()) or "heal"
