"""How fields of a file of measurements are read, and written: what is no number is NaN, and NaN is null."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainValidator

from iskd.system import Json
from iskd.system.reading import is_number


def only(kind: type[Any], otherwise: Any) -> BeforeValidator:
    """What is no `kind` counts as `otherwise`."""
    return BeforeValidator(lambda value: value if isinstance(value, kind) else otherwise)


def items(value: Any) -> tuple[Any, ...]:
    """What is no list counts as none."""
    return tuple(value) if isinstance(value, list) else ()


def plain(value: Any, digits: int | None = None) -> Any:
    """Strict JSON: null for numbers that are not finite, the others rounded to so many decimals."""
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else value if digits is None else round(value, digits)
    return value


Known = Annotated[float, PlainValidator(lambda value: value if is_number(value) else math.nan)]
Word = Annotated[str, only(str, "")]
Facts = Annotated[Json, only(dict, {})]
