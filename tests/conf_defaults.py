"""The code's defaults in conf/: `python -m tests.conf_defaults` writes them, tests/project/test_conf.py checks them.

A default is decided in the code and nowhere else. Hydra, however, sets a key without a plus, and `--cfg job` shows it,
only where a yaml has it. So a mapping of conf/ that describes an object has two halves. Above the line `# defaults of
the code` stands what differs from them, or has none; below it the keys that people set, with the code's own values.
A mapping without `_target_` says whose they are: `# defaults of iskd.plan.options.RunOptions`.

To show another key, write it below the line; to change a default, change it in the code; then run this.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).resolve().parents[1] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
OURS = "iskd."
LINE = re.compile(r"( *)# defaults of (the code|[\w.]+)$")
KEY = re.compile(r"( *)(\w+):( .*?)?(\s+#.*)?$")


def defaults(target: str) -> dict[str, Any]:
    """Default by argument of a class or function, as YAML would load it; `**keywords` are those of the class above."""
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    made = {key.name: key.default_factory for key in dataclasses.fields(found)} if _is_data(found) else {}
    kinds = [kind.__init__ for kind in found.__mro__ if "__init__" in vars(kind)] if inspect.isclass(found) else [found]
    values: dict[str, Any] = {}
    for takes in [found.from_block] if hasattr(found, "from_block") else kinds:
        arguments = inspect.signature(takes).parameters
        for key, argument in arguments.items():
            if argument.default is not argument.empty:
                value = made[key]() if callable(made.get(key)) else argument.default
                values.setdefault(key, list(value) if isinstance(value, tuple) else value)
        if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
            break
    return values


def _is_data(found: Any) -> bool:
    return inspect.isclass(found) and dataclasses.is_dataclass(found)


def same(one: Any, other: Any) -> bool:
    """Equal, and no truth value in the place of a number."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def mistakes(text: str) -> list[str]:
    """What in a yaml is a default of the code and stands above the line, or stands below it and is none."""
    loaded = yaml.safe_load(text) or {}
    below, whose = _below(text)
    found = []
    for place, node in [("", loaded), *loaded.items()]:
        if not isinstance(node, Mapping):
            continue
        target = str(node.get("_target_", whose.get(place, "")))
        known = defaults(target) if target.startswith(OURS) else {}
        for key, value in node.items():
            shown, default = (place, key) in below, key in known and same(value, known[key])
            if default and not shown:
                found.append(
                    f"{key}: {value} is the default of {target}: drop it, or move it below '# defaults of ...'"
                )
            if shown and not default:
                advice = "run python -m tests.conf_defaults" if key in known else "move it up: it has no default there"
                found.append(f"{key}: {value} is below '# defaults of ...' and not what {target} says: {advice}")
    return found


def _below(text: str) -> tuple[dict[tuple[str, str], int], dict[str, str]]:
    """The line number of each key below a marker, by mapping ("" = root) and key; and by mapping, whose defaults."""
    below, whose = dict[tuple[str, str], int](), dict[str, str]()
    place, indent = "", -1
    for number, line in enumerate(text.splitlines()):
        key, marker = KEY.match(line), LINE.match(line)
        if key and not key[1] and indent != 0:
            place, indent = key[2], -1
        if marker:
            indent = len(marker[1])
            place = place if indent else ""
            whose[place] = marker[2]
        elif key and len(key[1]) == indent:
            below[place, key[2]] = number
    return below, whose


def written(text: str) -> str:
    """The text with the code's own values below the lines; comments stay."""
    loaded = yaml.safe_load(text) or {}
    below, whose = _below(text)
    lines = text.splitlines()
    for (place, key), number in below.items():
        node = loaded[place] if place else loaded
        known = defaults(str(node.get("_target_", whose[place])))
        if key in known and not same(node[key], known[key]):
            value = yaml.safe_dump(known[key], default_flow_style=True, width=10_000, sort_keys=False)
            found = KEY.match(lines[number])
            assert found
            lines[number] = f"{found[1]}{key}: {value.removesuffix('...' + chr(10)).strip()}{found[4] or ''}"
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write what has changed."""
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if written(text) != text:
            file.write_text(written(text), encoding="utf-8")
            print(f"written: {file.relative_to(CONF.parent)}")
        for mistake in mistakes(written(text)):
            print(f"{file.relative_to(CONF.parent)}: {mistake}")


if __name__ == "__main__":
    main()
