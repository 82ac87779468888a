"""Plain values as the types of arguments take them: `10k` is 10000 where a count belongs, and 2.5 is none.

What a key of a config takes is said once, by the type of the argument that it becomes. pydantic compares; nothing is
guessed beyond the spellings that people and other tools use for the same value.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, reduce
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import AllowInfNan, BeforeValidator, Strict, TypeAdapter, ValidationError

from iskd.system.files import MAX_NUMBER

_COUNT = re.compile(r"([+-]?\d+(?:_\d+)*(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kmgbt]?)", re.IGNORECASE)
_TIMES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_TRUTH = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


@cache
def takes(kind: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default by argument of a class, function or TypedDict; blocks are made by `from_block`."""
    if hasattr(kind, "__total__"):
        return {key: (hint, inspect.Parameter.empty) for key, hint in get_type_hints(kind, include_extras=True).items()}
    makes = kind.from_block if hasattr(kind, "from_block") else kind
    found: dict[str, tuple[Any, Any]] = {}
    for key, argument in inspect.signature(makes).parameters.items():
        if argument.kind is inspect.Parameter.VAR_KEYWORD:
            # by its text: Python 3.10 has no Unpack, so that no module holds the name at run time
            common = str(argument.annotation).removeprefix("Unpack[").removesuffix("]")
            handed_on = takes(_hint(common, makes, key)) if common != str(argument.annotation) else {}
            found |= {name: (hint, _default_above(kind, name)) for name, (hint, _) in handed_on.items()}
        elif argument.annotation is not inspect.Parameter.empty:
            found[key] = (_hint(argument.annotation, makes, key), argument.default)
    return found


def _default_above(kind: Any, key: str) -> Any:
    """The default of an argument that a class hands on to those above it."""
    for each in inspect.getmro(kind)[1:] if inspect.isclass(kind) else ():
        argument = inspect.signature(vars(each)["__init__"]).parameters.get(key) if "__init__" in vars(each) else None
        if argument is not None and argument.default is not inspect.Parameter.empty:
            return argument.default
    return inspect.Parameter.empty


def _hint(annotation: Any, makes: Any, key: str) -> Any:
    """An annotation as a type: its names are those of the module where it was written."""
    if not isinstance(annotation, str):
        return annotation
    written = makes
    if inspect.isclass(makes):
        holds = (lambda each: key in vars(each).get("__annotations__", ())) if dataclasses.is_dataclass(makes) else None
        written = next(each for each in makes.__mro__ if (holds(each) if holds else "__init__" in vars(each)))
    names = vars(sys.modules[written.__module__])
    try:
        return get_type_hints(types.SimpleNamespace(__annotations__={"it": annotation}), names, include_extras=True)[
            "it"
        ]
    except NameError:  # an object that is passed beside the keys: no value of a config
        return Any


def read_value(name: str, value: Any, hint: Any, default: Any = inspect.Parameter.empty) -> Any:
    """A plain value as a type takes it.

    Raises ValueError where it is none of that type or out of the range that the type declares (pydantic's `PositiveInt`
    and its like); NaN is no number, and an infinity none that a setting can have.
    """
    try:
        read = _adapter(hint).validate_python(value)
    except ValidationError:
        known = isinstance(default, str | int | float) or default is None
        usual = f" (the default is {shown(default)})" if known else ""
        raise ValueError(f"{name}={shown(value)} must be {_words(hint)}{usual}") from None
    return read


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_lenient(hint))


def _lenient(hint: Any) -> Any:
    """The same type, strict but for other spellings of a value; containers as a config has them."""
    if hint in _SPELLED:
        return Annotated[hint, Strict(), BeforeValidator(_SPELLED[hint])]
    if hint is Path:
        return Annotated[str, Strict()]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:  # with the range that the argument declares
        return reduce(lambda read, bound: Annotated[read, bound], inner[1:], _lenient(inner[0]))
    if origin in (Union, types.UnionType):
        # where a text is taken, 10k is one
        read = [_STRICT[each] if str in inner and each in _STRICT else _lenient(each) for each in inner]
        return Union[tuple(each for each in read if each is not Any)]  # noqa: UP007 - made of a tuple
    if origin is tuple and inner[-1] is not Ellipsis:
        return Annotated[list[_lenient(inner[0])], BeforeValidator(_of_length(len(inner)))]  # type: ignore[misc]
    if _is_list(origin):
        return Annotated[list[_lenient(inner[0])], Strict()]  # type: ignore[misc]
    if origin in (dict, Mapping):
        return Annotated[dict[str, Any], Strict()]
    if origin is Literal or hint in (None, type(None)):
        return hint
    return Any  # an object that is passed beside the keys, which no config can hold


def _is_list(origin: Any) -> bool:
    return inspect.isclass(origin) and issubclass(origin, Iterable) and not issubclass(origin, Mapping)


def _of_length(length: int) -> Any:
    def check(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != length:
            raise ValueError(f"a list of {length}")
        return value

    return check


def _count(value: Any) -> Any:
    """10k, 2M, 1_000, 1e3 and "16" are whole numbers; 2.5 stays what it is."""
    if isinstance(value, str) and (found := _COUNT.fullmatch(value.strip())):
        number = found[1].replace("_", "")
        exact = int(number) if number.lstrip("+-").isdigit() else float(number)
        value = exact * _TIMES[found[2].lower()]
        if isinstance(value, float) and isfinite(value) and abs(value - round(value)) <= 1e-12 * abs(value):
            value = round(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ValueError("larger than any number here")
    return value


def _number(value: Any) -> Any:
    """As a count, and fractions: 0.5, "1e-4"."""
    if isinstance(value, str) and _COUNT.fullmatch(value.strip()):
        try:
            value = float(value)
        except ValueError:
            value = _count(value)
    if isinstance(value, float) and not isfinite(value):
        raise ValueError("not a number")
    return value


def _truth(value: Any) -> Any:
    """As YAML once had them: yes and no, on and off."""
    return _TRUTH.get(value.strip().lower(), value) if isinstance(value, str) else value


def _text(value: Any) -> Any:
    """A name that is a number: Hydra reads `data.path=2024` and `trainer.precision=16` as one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_SPELLED: Mapping[Any, Any] = {int: _count, float: _number, bool: _truth, str: _text}
_STRICT: Mapping[Any, Any] = {
    **{kind: Annotated[kind, Strict()] for kind in _SPELLED},
    float: Annotated[float, Strict(), AllowInfNan(False)],
}
_WORDS = {
    int: "an integer such as 4, 10k or 2e6",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
}


def _words(hint: Any) -> str:
    """What a type takes, for users."""
    return " or ".join(dict.fromkeys(_alternatives(hint)))


_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _range(declared: Iterable[Any]) -> str:
    """The bounds of a number, for users."""
    bounds = (bound for each in declared for bound in getattr(each, "metadata", [each]))
    said = ((word, getattr(bound, sign, None)) for bound in bounds for sign, word in _BOUNDS.items())
    return " and ".join(f"{word} {limit}" for word, limit in said if limit is not None)


def _alternatives(hint: Any) -> Iterator[str]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for each in inner:
            yield from _alternatives(each)
    elif origin is Annotated:
        yield f"{_words(inner[0])}, {_range(inner[1:])}"
    elif origin is Literal:
        yield from map(str, inner)
    elif hint in (None, type(None)):
        yield "null"
    elif hint in _WORDS:
        yield _WORDS[hint]
    elif origin is tuple and inner[-1] is not Ellipsis:
        yield f"a list of {len(inner)} numbers"
    elif _is_list(origin):
        yield f"a list [A,B,...], each {_words(inner[0])}"
    elif origin in (dict, Mapping):
        yield "keys with values {A: 1, B: 2}"


def shown(value: Any) -> str:
    """A value as it is written on the command line, shortened."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
