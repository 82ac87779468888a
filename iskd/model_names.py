"""What `model=` may name on the command line and in Python: a preset, a folder, a model on the hub."""

from __future__ import annotations

import re
from pathlib import Path

_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SWEEP = re.compile(r"[,()\[\]{}*]")  # several values at once, which Hydra reads


def named_model(name: str) -> list[str]:
    """The overrides that a name stands for: `model=PRESET`, or `model=local` or `model=hub` with the name beside it.

    A preset of conf/model goes before a folder of that name; ./name is the folder. Empty for what is none of the three.

    Raises:
        ValueError: it can only be meant as a folder, and there is none.
    """
    if not name:
        return []
    if "/" not in name and (CONF / "model" / f"{name}.yaml").is_file():
        return [f"model={name}"]
    quoted = "'" + name.replace("'", "\\'") + "'"  # a folder's name may hold what means something to Hydra
    if Path(name).expanduser().is_dir():
        return ["model=local", f"model.path={quoted}"]
    if _SWEEP.search(name):
        return []
    refuse_missing_folder("model", name)
    return ["model=hub", f"model.name={quoted}"] if _HUB_ID.fullmatch(name) else []


def refuse_missing_folder(what: str, name: str) -> None:
    """Raise ValueError for a name that is a folder's by its form, but no folder: the hub would be asked in vain."""
    first, slash, _ = name.partition("/")
    inside = bool(slash) and Path(first).is_dir()
    if not (inside or first in ("", ".", "..") or name.startswith("~") or name.count("/") > 1):
        return
    hint = f" (there is a folder {first!r}, so it is not taken for a name on the hub)" if inside else ""
    raise ValueError(f"{what}={name!r}: no such folder{hint}; give a folder, a preset of conf/model or OWNER/NAME")
