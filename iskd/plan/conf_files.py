"""What can be chosen: the yaml files that ship with the package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# beside the package in a checkout, inside it in a wheel
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


def options(group: str) -> list[str]:
    """What can be chosen of a config group, e.g. of `data`, sorted; a file `_name.yaml` is only included by others."""
    return sorted(file.stem for file in (CONF / group).glob("[!_]*.yaml"))
