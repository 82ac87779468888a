"""Checkpoint folders: which are whole, which is newest, which are dropped."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from iskd.models.weights import check_whole
from iskd.system import Json, file_sha256, read_json

STAGE, BOUNDARY = "stage", "boundary"
STUDENT = "student"
_OWNERS, _RNG, _STATE = (STUDENT, "optimizer"), "rng.safetensors", "state.json"
_FILE = re.compile(r"(student|optimizer)(-\d{5}-of-\d{5})?\.safetensors|rng\.safetensors|state\.json")
_NAME = re.compile(rf"[0-9]{{1,9}}-({STAGE}|{BOUNDARY})")


def _entry(path: Path) -> Json:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _order(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _folders(root: Path) -> list[Path]:
    found = [
        path for path in root.glob("*-*") if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=_order)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _manifest(path: Path) -> dict[str, Json]:
    """Entries of the manifest by file name. Raises ValueError when a file that belongs to a checkpoint is not in it."""
    files = read_json(path / "manifest.json")["files"]
    if not isinstance(files, dict) or not all(_FILE.fullmatch(name) for name in files):
        raise ValueError("manifest.json names files that are not a checkpoint's")
    for owner in _OWNERS:
        shards = [name for name in files if name.startswith(f"{owner}-")]
        expected = {f"{owner}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)}
        if (f"{owner}.safetensors" in files) == bool(shards) or set(shards) != expected:
            raise ValueError(f"manifest.json does not list {owner} whole")
    if _RNG not in files or _STATE not in files:
        raise ValueError(f"manifest.json lacks {_RNG} or {_STATE}")
    for name in files:
        if (path / name).is_symlink() or not (path / name).is_file():
            raise ValueError(f"{name} is missing or no plain file")
    return files


def _right_sizes(path: Path) -> bool:
    try:
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in _manifest(path).items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def problem(path: Path, *, digests: bool = True) -> str | None:
    """Why a checkpoint cannot be used, or None when every file has the size and digest of its manifest.

    Without `digests` the large files are not read, but for the heads of the student's.
    """
    try:
        for name, entry in _manifest(path).items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has the wrong size"
            if (digests or name == _STATE) and file_sha256(path / name) != entry["sha256"]:
                return f"{name} was changed after it was written"
            if not digests and name.startswith(STUDENT):
                check_whole(path / name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"it is not complete ({error})"
    return None


_log = logging.getLogger(__name__)


def newest(root: Path, kind: str = "", *, digests: bool = True) -> Path | None:
    """The newest whole checkpoint below `root` (of one `kind`), or None; torn ones are skipped with a warning.

    `digests` are those of `problem`.
    """
    for path in reversed(_folders(root)):
        if not path.name.endswith(kind):
            continue
        trouble = problem(path, digests=digests)
        if trouble is None:
            return path
        _log.warning("checkpoint %s is skipped: %s; using the one before it", path, trouble)
    return None


def prune(root: Path, *, keep: int = 2, pinned: Collection[Path] = ()) -> None:
    """Delete all but the newest `keep` checkpoints, the pinned ones, and drafts of killed writers."""
    # the newest is the one just written; sizes tell torn ones apart without reading gigabytes
    whole = [path for path in _folders(root) if _right_sizes(path)]
    for path in _folders(root):
        if path not in {*whole[-keep:], *pinned}:
            shutil.rmtree(path, ignore_errors=True)
    for draft in root.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)
