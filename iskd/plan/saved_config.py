"""The config of a run as its folder holds it: plain values from YAML that anybody may have written.

What a run saved was resolved, so it holds no `${`. One that does would name other keys, read the environment of whoever
opens the folder, or become another value after it was checked: it is refused, escaped or not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from iskd.plan.renamed import renamed
from iskd.system import Json
from iskd.system.files import read_plain

GROUPS = ("model", "data", "edit", "block", "mixer", "importance", "schedule", "loss", "optim", "trainer", "run")
"""What every run of today chooses, each a mapping; one that an earlier version did not have may be missing."""
OPTIONAL = ("refit", "teacher", "profile")
"""Mappings that may be null as well."""
_LONGEST = 1 << 18  # bytes; a run writes about 5,000
_DEEPEST = 32  # levels
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """YAML as a run writes it: no value stands for another one, no key twice in a mapping, 1e-3 is a number."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A few aliases of aliases are a tree of billions."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name) could stand for more than 5000 keys", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Which of two values counts would depend on the reader."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r:.80} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


# as OmegaConf, which writes these files, reads them: 1e-3 and 1.0e5 are numbers, a day is text
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_config(file: Path) -> Json:
    """The config of a run, its parts by today's names.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no plain file, too long, no YAML of plain values, or as `literal`.
    """
    text = read_plain(file, max_bytes=_LONGEST)
    try:
        values = _Loader(text.decode("utf-8")).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{file} cannot be read as the config of a run ({said:.200}): restore it from a copy"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} must hold keys and values, got {type(values).__name__}: it is not the config of a run"
        )
    found: Json = renamed(literal(values, str(file)))
    return found


def no_mappings(values: Json) -> list[str]:
    """Groups of a config that are there and hold no keys and values."""
    wrong = [group for group in (*GROUPS, *OPTIONAL) if not isinstance(values.get(group, {}), dict)]
    return [group for group in wrong if group in GROUPS or values[group] is not None]


def literal(values: Any, where: str) -> Any:
    """Nested containers whose every value means itself; `where` says whose they are.

    Raises:
        ValueError: a key or a value holds `${`, or is of a kind that no config has, or a `_target_` is no text.
    """
    level = [("", values)]
    for _ in range(_DEEPEST):
        level = [item for key, value in level for item in _inside(key, value, where)]
        if not level:
            return values
    raise ValueError(f"{where}: nested deeper than {_DEEPEST} levels, so it is not the config of a run")


def _inside(place: str, value: Any, where: str) -> list[tuple[str, Any]]:
    """What a container holds, by dotted keys; nothing for a plain value."""
    if isinstance(value, dict):
        for key in value:
            _plain(f"{place}.{key}".lstrip("."), key, where)
        if not isinstance(target := value.get("_target_", ""), str):
            raise ValueError(
                f"{where}: {f'{place}._target_'.lstrip('.'):.200}={target!r:.80} must be the dotted path of a class: "
                "write it as text"
            )
        return [(f"{place}.{key}".lstrip("."), item) for key, item in value.items()]
    if isinstance(value, list):
        return [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    _plain(place, value, where)
    return []


def _plain(place: str, value: Any, where: str) -> None:
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{where}: {place:.200} is a {type(value).__name__}, which no config of a run holds: drop it")
    if isinstance(value, str) and "${" in value:
        raise ValueError(
            f"{where}: {place:.200} holds {value!r:.200}, but the config of a run holds no interpolation (${{...}}), "
            "no escaped one either: in a folder from elsewhere it could run code or read this machine's environment. "
            "Write the value that is meant, and give files and folders names without ${"
        )
