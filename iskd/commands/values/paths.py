"""Paths on the command line and in a config: as they are, whatever is in their names, `~` as the home folder.

Hydra's grammar has a use for most of the signs that names of files hold. The value of a key that takes a path is the
path as it was given, and never grammar where such a file is there. What Hydra has to read is left to it: quotes,
`${...}`, and in a sweep commas and functions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from iskd.system.files import expanded
from iskd.system.text import argument

# by their names, as the parts of anybody have them too
_PATHS = re.compile(
    r"(.*[._])?(path|folder|file|dir|subdir)s?|resume|reference|eval\.text|importance\.tokenizer|budget\.(plan|library)"
)
_QUOTES = "'\""
_AT_HOME = '${{at_home:"{}"}}'
_OWN = re.compile(r"\$\{(at_home|new_folder|hydra):")
_OR_NAMES = re.compile(r"data\.(source|sources\.[\w-]+)\.name")


def takes_path(key: str) -> bool:
    """Whether the value of a key is the name of a file or a folder, or may be one."""
    return _OR_NAMES.fullmatch(key) is not None or _PATHS.fullmatch(key) is not None


def at_home(node: dict[str, Any], place: str = "") -> None:
    """Put the home folder in the place of a leading `~` in every path of a config, wherever its value came from."""
    for key, value in node.items():
        if isinstance(value, dict):
            at_home(value, f"{place}{key}.")
        elif takes_path(f"{place}{key}"):
            node[key] = _expanded(value)


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    return expanded(value) if isinstance(value, str) else value


def assigned(key: str, value: str) -> str:
    """The override by which Hydra sets a key to this text, whatever is in it.

    Raises ValueError where that is `${`: what a run saves may not hold it (`iskd.plan.saved_config`).
    """
    if "${" in value:
        raise ValueError(f"{key}={value}: no file or folder with ${{ in its name can be given; rename it")
    return f"{key}={_quoted(value)}"


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def literal(key: str, value: str, *, several: bool = False) -> str:
    """The override of a key that takes a path, as Hydra reads it; `several` for a sweep, where commas part values.

    A key whose name is a plural takes a list; what looks like one is a name anywhere else.
    """
    override, read = f"{key}={value}", _read(value)
    meant = None if read is None else read.value()
    if value in ("", "???") or (read is not None and meant is None):
        return override
    if not _is_there(value):
        if "${" in value:
            if key.startswith("hydra.") and not _OWN.search(value) and '"' not in path_of(value):
                return f"{key}={_quoted(_AT_HOME.format(path_of(value)))}"
            return f"{key}={expanded(value) if _read(expanded(value)) else _quoted(expanded(value))}"
        if several and read is not None and read.is_sweep_override() and not _is_choice(meant):
            return override
        if several and len(parts := _parts(value, read)) > 1:
            return f"{key}={','.join(literal('', part)[1:] for part in parts)}"
        if key.endswith("s") and value[0] == "[" and value[-1] == "]":
            inside = ",".join(literal("", part)[1:] for part in _parts(value[1:-1], None))
            return override if isinstance(meant, list) else f"{key}=[{inside}]"
    path = expanded(path_of(value))
    return override if meant == path and "${" not in path else assigned(key, path)


def path_of(value: str) -> str:
    """The path that a value names: as it is, as Hydra would read it or without its quotes, whichever is there.

    Where none is, that of a quoted value is what the quotes hold, and that of any other the value as it is.
    """
    read = _read(value)
    meant = None if read is None else read.value()
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in _QUOTES
    found = [value, *([meant] if isinstance(meant, str) else [value[1:-1]] if quoted else [])]
    # Lightning puts quotes around a path that may hold them: Hydra cannot read that
    return next((path for path in found if _is_there(path)), found[-1] if quoted else value)


def at_fault(error: OSError, overrides: Sequence[str]) -> str:
    """What is said of a file or a folder that cannot be used: by which argument it was named; "" where by none.

    Args:
        error: of the system.
        overrides: as on the command line.
    """
    # what somebody has told in other words stays
    if error.errno is None or error.args[:1] != (error.errno,) or not isinstance(error.filename, str | os.PathLike):
        return ""
    file = PurePath(os.path.abspath(error.filename))
    for key, equal, value in (given.lstrip("+").partition("=") for given in overrides):
        if not equal or not takes_path(key):
            continue
        named = PurePath(os.path.abspath(expanded(path_of(value))))
        if file.is_relative_to(named) or named.is_relative_to(file):  # it, what lies in it, or a folder on the way
            where = "" if file == named else f" ({file})"
            return f"{argument(key, path_of(value))} cannot be used: {error.strerror}{where}; name another place"
    return ""


def _parts(value: str, read: Override | None) -> list[str]:
    """The values of a sweep: names that are there, whatever is in them, else what Hydra parts, else at every comma."""
    pieces, found = value.split(","), list[str]()
    while pieces:
        sizes = range(len(pieces), 0, -1)
        size = next((size for size in sizes if _is_there(",".join(pieces[:size]).strip())), 0)
        if not size and read is not None and read.is_sweep_override():
            return list(read.sweep_string_iterator())
        found.append(",".join(pieces[: size or 1]).strip())
        pieces = pieces[size or 1 :]
    return found


def _is_choice(meant: object) -> bool:
    return isinstance(meant, ChoiceSweep) and meant.simple_form


def _is_there(path: str) -> bool:
    return os.path.lexists(expanded(path))


def _read(value: str) -> Override | None:
    """A value by Hydra's grammar, None where it is none."""
    try:
        return _parser().parse_override(f"key={value}")
    except HydraException:
        return None


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
