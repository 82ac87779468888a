"""Groups, choices and keys as the text of conf/ has them, each with its comment; and what a mistyped one may mean.

The files are read line by line, not composed: that takes milliseconds, and YAML's own readers drop comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from iskd.system.text import nearest, perhaps
from iskd.system.version import CONF, options

_LINE = re.compile(r"( *)(?!-)([\w.]+):(?: +([^#\s].*?|))??(?:\s+# ?(.*))?$")
_CHOICE = re.compile(r"  - (\w+): (.*?)(?:\s+# ?(.*))?$")
_OTHERS = re.compile(r"\b(?!_self_)\w+")
_INCLUDES = re.compile(r"^defaults: \[(.*)\]", re.MULTILINE)


@dataclass(frozen=True)
class Key:
    """A key that can be set, or a group of which one is chosen.

    Attributes:
        name: dotted.
        value: what it is where nothing is said, as the file has it; "" for a mapping of keys.
        about: the comment; "" where there is none.
    """

    name: str
    value: str
    about: str


@cache
def choices() -> dict[str, Key]:
    """The groups of conf/config.yaml, with what is chosen where nothing is said."""
    found = (_CHOICE.match(line) for line in _lines("config"))
    return {key[1]: Key(key[1], key[2].strip("[]").replace("null", ""), key[3] or "") for key in found if key}


@cache
def about(group: str, option: str) -> str:
    """What a choice is: the first sentence of the comment above its file; "" where there is none."""
    words = []
    for line in _lines(f"{group}/{option}"):
        if not line.startswith("#"):
            break
        if "@package" not in line:
            words.append(line[1:].strip())
    return re.split(r"(?<=[\w)])\.(?: |$)", " ".join(words))[0].rstrip(".")


@cache
def keys_of(group: str, option: str) -> dict[str, Key]:
    """The keys of one choice by their dotted names; those of a file that it includes among them."""
    file = f"{group}/{option}"
    included = _INCLUDES.search("\n".join(_lines(file)))
    found: dict[str, Key] = {}
    for name in _OTHERS.findall(included[1]) if included else ():
        found |= keys_of(group, name)
    for key in _read(file):
        before = found.get(key.name)
        found[key.name] = Key(key.name, key.value, before.about) if before and not key.about else key
    return found


@cache
def root_keys() -> dict[str, Key]:
    """The keys of conf/config.yaml itself, Hydra's left out."""
    return {key.name: key for key in _read("config") if key.name.split(".")[0] != "hydra"}


def roots_known() -> list[str]:
    """What may stand at the root of a config."""
    return list(dict.fromkeys([*choices(), *(key.split(".")[0] for key in root_keys())]))


def known(group: str) -> dict[str, Key]:
    """The keys of all choices of a group, and those that the root has for it."""
    found: dict[str, Key] = {}
    for option in options(group):
        found = keys_of(group, option) | found
    return found | {name: key for name, key in root_keys().items() if name.startswith(f"{group}.")}


def _read(file: str) -> Iterator[Key]:
    """Keys of a file; what lies below another is dotted behind it."""
    group, _, _ = file.rpartition("/")
    above: list[tuple[int, str]] = []
    for line in _lines(file):
        found = _LINE.match(line)
        if not found or line.lstrip().startswith("#"):
            continue
        depth, name = len(found[1]), found[2]
        while above and above[-1][0] >= depth:
            above.pop()
        dotted = ".".join(filter(None, [group, *(each for _, each in above), name]))
        above.append((depth, name))
        if name != "_target_" and "defaults" not in dotted.split("."):
            yield Key(dotted, found[3] or "", found[4] or "")


@cache
def _lines(file: str) -> tuple[str, ...]:
    return tuple((CONF / f"{file}.yaml").read_text(encoding="utf-8").splitlines())


# ---- what a mistyped word may mean -----------------------------------------------------------------------------------


def unknown_key(name: str) -> str:
    """What is said of a key that nothing takes: what it may have meant, and which choices take it."""
    group, _, rest = name.partition(".")
    roots = roots_known()
    if group not in roots:
        if group == "hydra":
            return f"{name} is no key of Hydra's: iskd train --cfg hydra shows them"
        listed = perhaps(group, roots) or f"; there are {', '.join(roots)}"
        return f"there is no group or key {group!r}{listed}"
    if not rest:
        takes = options(group)
        return f"{group} takes a choice: one of {', '.join(takes)}" if takes else f"{group} takes {_value_of(group)}"
    have = [option for option in options(group) if name in keys_of(group, option)]
    if have:
        which = "it" if len(have) == 1 else "one of them"
        chosen = ", ".join(f"{group}={option}" for option in have)
        return f"{name} is a key of {chosen} alone: add {which}, or leave the key out"
    keys = [key for key in known(group) if key != group]
    near = nearest(name, keys) or next((key for key in keys if key.endswith(f".{rest}")), None)
    if near:
        return f"{group} has no key {rest!r} (did you mean {near}?)"
    listed = ", ".join(key.removeprefix(f"{group}.") for key in keys)
    return f"{group} has no key {rest!r}; it has {listed or 'none'}"


def _value_of(root: str) -> str:
    """What a key of the root takes: the keys below it, or a value."""
    below = [name for name in root_keys() if name.startswith(f"{root}.")]
    return f"keys: {', '.join(below)}" if below else f"a value: {root}=VALUE"
