"""JSON that anybody may have written, read into dataclasses by the types of their fields (pydantic, strict).

A field's annotation says what it takes: `Annotated[int, between(0, 9)]`, `Annotated[str, Field(max_length=80)]`. Its
checks hold when a value is read, not when code makes one. Files are first read by `iskd.system.read_json`, which bounds
their size and depth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import cache
from typing import Annotated, Any, TypeVar, cast, get_type_hints

from pydantic import AfterValidator, PlainValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from iskd.system.files import MAX_NUMBER

_T = TypeVar("_T")
_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a number",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "string_too_long": "a string of at most {max_length} characters",
    "literal_error": "one of {expected}",
    "string_type": "a string",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
"""What a value must be, in the user's words, by pydantic's name of the error."""


def read_as(kind: type[_T], data: Any, what: str, *, joint: str = ": ", others: bool = False) -> _T:
    """A dataclass made of plain JSON values.

    Types are strict: no number is read from text, `true` is no integer, 1.0 neither.

    Args:
        kind: a dataclass; of its fields those without a default are required.
        data: as `read_json` gives it.
        what: the thing in words, the beginning of an error.
        joint: between `what` and its keys, in an error.
        others: whether unknown keys are ignored; else they are refused.

    Raises:
        ValueError: `data` is not as the fields say. The message names the place, the value, shortened, and what is
            expected there.
    """
    try:
        # only as JSON text does pydantic take a list for a tuple, and an object for a dataclass, without being lax
        text = json.dumps(data, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be plain JSON: {error!s:.200}") from None
    try:
        return _adapter(cast(Any, kind))[0].validate_json(text, strict=True, extra="ignore" if others else "forbid")
    except ValidationError as error:
        raise ValueError(_sentence(error, kind, what, joint)) from None


@cache
def _adapter(kind: Any) -> tuple[TypeAdapter[Any], list[str]]:
    """What reads a type, and the keys of a dataclass as they stand in a file: both evaluate its annotations.

    Made at the first use, as a large schema takes milliseconds.
    """
    fields = getattr(kind, "__dataclass_fields__", ())
    hints = get_type_hints(kind, include_extras=True) if fields else {}
    told = ((name, getattr(hints[name], "__metadata__", ())) for name in fields)
    keys = [
        next((each.alias for each in extras if isinstance(each, FieldInfo) and each.alias), name)
        for name, extras in told
    ]
    return TypeAdapter(kind), keys


def _sentence(found: ValidationError, kind: type[Any], what: str, joint: str) -> str:
    """The first thing that is wrong; a wrong key comes before a wrong value."""
    errors = found.errors(include_url=False)
    keys = ("unexpected_keyword_argument", "missing")
    error = min(errors, key=lambda each: keys.index(each["type"]) if each["type"] in keys else len(keys))
    name, value, context = error["type"], error["input"], error.get("ctx", {})
    *above, last = error["loc"] or ("",)
    if name in keys:
        place = _place(what, above, joint)
        if name == "missing":
            return f"{place}: key {last!r} is missing"
        known = "" if above else f"; known are {', '.join(_adapter(cast(Any, kind))[1])}"
        return f"{place}: unknown key {last!r:.80}{known or ': remove it'}"
    place = _place(what, error["loc"], joint)
    if name.startswith("union_tag"):
        key = context["discriminator"].strip("'")
        tags = sorted(context.get("expected_tags", "").split(", "))
        known = f"; known are [{', '.join(tags)}]" if any(tags) else ""
        return f"{place}: unknown {key} {value.get(key)!r:.80}{known}"
    if name == "value_error":
        said = str(context["error"])
        return f"{place} {said}, got {value!r:.80}" if said.startswith("must ") else f"{place}: {said}"
    if name in _EXPECTED:
        return f"{place} must be {_EXPECTED[name].format(**context)}, got {value!r:.80}"
    return f"{place}: {error['msg']}, got {value!r:.80}"


def _place(what: str, keys: Collection[int | str], joint: str) -> str:
    return what + "".join(f"[{key}]" if isinstance(key, int) else f"{joint}{key:.80}" for key in keys)


# ---- what a field takes ----------------------------------------------------------------------------------------------


def between(low: int, high: int = MAX_NUMBER) -> AfterValidator:
    """An integer of that range."""

    def check(value: int) -> int:
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high}")
        return value

    return AfterValidator(check)


def must_be(words: str, fits: Callable[[Any], bool]) -> PlainValidator:
    """Whatever `fits`, kept as it stands; else an error says that it must be `words`."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise ValueError(f"must be {words}")
        return value

    return PlainValidator(check)


def one_of(known: Collection[str]) -> AfterValidator:
    """One of some words."""

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"must be one of {known}")
        return value

    return AfterValidator(check)


def is_integer(value: Any) -> bool:
    """Whether JSON says an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether JSON says a number that a float can hold; an integer of a thousand digits is none."""
    return isinstance(value, float) or (is_integer(value) and abs(value) <= MAX_NUMBER)


def _float(value: Any) -> float:
    if not is_number(value):
        raise ValueError("must be a number")
    return float(value)


Count = Annotated[int, between(0)]
Number = Annotated[float, PlainValidator(_float)]
"""Nan and the infinities are numbers."""
