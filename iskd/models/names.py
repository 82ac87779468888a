"""A model by its name: a folder that is there, or a hub id."""

from __future__ import annotations

from pathlib import Path


def refuse_missing_folder(what: str, name: str) -> None:
    """Raise ValueError for a name that is a folder's by its form, but no folder: the hub would be asked in vain."""
    first, slash, _ = name.partition("/")
    inside = bool(slash) and Path(first).is_dir()
    if not (inside or first in ("", ".", "..") or name.startswith("~") or name.count("/") > 1):
        return
    hint = f" (there is a folder {first!r}, so it is not taken for a name on the hub)" if inside else ""
    raise ValueError(f"{what}={name!r}: no such folder{hint}; give a folder, a preset of conf/model or OWNER/NAME")
