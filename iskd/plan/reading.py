"""Values of the plan from JSON, and as JSON: a student is rebuilt from a file without Hydra."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from iskd.plan.edits import Edit, Record, Spec
from iskd.plan.stage import Stage
from iskd.system import Json
from iskd.system.reading import read_as


def to_json(value: Spec | Edit | Record | Stage) -> Json:
    """Plain JSON of any value of the plan."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def record_from_json(data: Any) -> Record:
    """Read a record, whose classes are not imported yet. Raises ValueError where its edits cannot be applied."""
    return read_as(Record, data, "Record")


def stage_from_json(data: Any) -> Stage:
    """Read a stage. Raises ValueError on an unknown key, a value of the wrong type or a rate that is not finite."""
    name = data.get("name") if isinstance(data, Mapping) else None
    return read_as(Stage, data, f"Stage {name!r:.80}" if isinstance(name, str) else "Stage")
