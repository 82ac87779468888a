"""What a run does, as data: specs, edits, stages and the record. Frozen values and JSON, no torch.

Everything that must survive a checkpoint or travel between ranks lives here, so that a student can be rebuilt
from a file without Hydra and a decision can be printed before anything is changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from iskd.plan.edits import _EDITS, Edit, Record, Spec
from iskd.plan.stage import OBJECTIVES, SHAPES, TRAIN, LoraSpec, Stage
from iskd.system import Json
from iskd.system.files import MAX_NUMBER

# What a file may ask for at most. A real plan stays far below; a forged one must not cost memory or hours.
MAX_LAYERS = 10_000
_MAX_TEXT = 10_000
_MAX_NAME = 256
_MAX_SIZE = 1_000_000
_MAX_VALUES = 1_000
_MAX_WAYS = 500_000


def to_json(value: Spec | Edit | Record | Stage) -> Json:
    """Plain JSON of any value of this module."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


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
