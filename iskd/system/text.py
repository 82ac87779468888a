"""Numbers, sizes, durations and lists of layers as people read them; and the word that a mistyped one may mean."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

ABSENT = "-"
_PLAIN = re.compile(r"[\w./@%+-]+")
_NEAR = 0.6  # of difflib's ratio: "tiy" and "tiny" have 0.86, "idl" and "ild" 0.67
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def argument(key: str, value: object) -> str:
    """`key=value` as it is pasted into a shell."""
    return shlex.quote(f"{key}={value}")


def hydra_text(value: object) -> str:
    """A value as Hydra's command line reads it. A path alone is read as it is (`iskd.commands.values.paths`)."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_nested(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_nested, value)) + "]"
    return "null" if value is None else str(value)


def _nested(value: object) -> str:
    """In quotes where something of a text would end the value."""
    if not isinstance(value, str) or _PLAIN.fullmatch(value):
        return hydra_text(value)
    return "'" + value.replace("\\", r"\\").replace("'", r"\'") + "'"


def number(value: float | None, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits and no needless ones; `ABSENT` for None and NaN."""
    if value is None or math.isnan(value):
        return ABSENT
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def percent(value: float | None) -> str:
    """A ratio as a percentage with one decimal, without the sign."""
    return ABSENT if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def byte_unit(largest: float) -> tuple[float, str]:
    """Bytes of the decimal unit in which sizes up to `largest` are best told, and its name."""
    return next(((unit, name) for unit, name in _BYTES if largest >= unit), _BYTES[-1])


def duration(seconds: float) -> str:
    """A wall time in hours or minutes."""
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def kl_text(value: float) -> str:
    """KL with three decimals, so that a column lines up; significant digits where those would all be zero."""
    return f"{value:.3f}" if value == 0 or 1e-3 <= value < 1e3 else number(value)


def layers_text(layers: Sequence[int]) -> str:
    """Layers with runs of three or more folded: [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def nearest(word: str, known: Iterable[str], near: float = _NEAR) -> str | None:
    """The one of `known` that looks most like a word, in capitals or not; None where none does."""
    as_known = {each.lower(): each for each in known}
    return next((as_known[each] for each in difflib.get_close_matches(word.lower(), as_known, 1, near)), None)


def perhaps(word: str, known: Iterable[str]) -> str:
    """What an error adds: the word that may have been meant; "" where none looks like it."""
    found = nearest(word, known)
    return f" (did you mean {found}?)" if found else ""


def one_of(keys: Iterable[str]) -> str:
    """The fix of a key that there is not: the keys that there are, if any."""
    listed = ", ".join(keys)
    return f"drop it, or use one of {listed}" if listed else "drop it; there are no keys here"
