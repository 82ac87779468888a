"""Files of a run: read within limits, written whole, told apart by their digest."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

# A draft says who makes it: machine, process, when that began (process numbers come again), and a number of its own.
_DRAFT = re.compile(r"\..+?(?:\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{12})?\.draft")
# Temporary folders of token shards as iskd 0.1 named them.
_SHARDS_0_1 = re.compile(r"\.[0-9a-f]{16}\.[a-z0-9_]{8}")
ABANDONED_S = 86_400.0
"""Seconds without a change after which a draft of another machine, or of nobody known, is one that nobody finishes."""


def write_whole(file: Path, content: str | bytes) -> Path:
    """Write a file atomically: a reader, or whoever looks after a kill, finds the old one or the new one, whole.

    Text is written as UTF-8, its line ends as they are. No link is followed: one that lies at `file` is replaced, and
    the draft, in the same folder under a name of its own, is always a new file. Its permissions are the umask's.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `file` is as it was.
    """
    draft = draft_of(file)
    try:
        with draft.open("xb") as opened:
            opened.write(content.encode() if isinstance(content, str) else content)
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return file


def expanded(path: str | Path) -> str:
    """A path with the home folder for a leading `~` or `~user`; a name that only begins so stays as it is."""
    return os.path.expanduser(path)


def draft_of(path: Path) -> Path:
    """A new name beside `path` for what is to take its place; `sweep` knows by it whether its process still lives."""
    process = os.getpid()
    began = _began(process) or 0
    return path.with_name(f".{path.name}.{_machine()}-{process}-{began}-{uuid4().hex[:12]}.draft")


@contextmanager
def scratch(name: str, folder: Path | None = None) -> Iterator[Path]:
    """A folder of this process alone, gone afterwards; one that a killed process left is swept by the next.

    Args:
        name: what it is for.
        folder: where it lies; None = where the system keeps temporary files.

    Raises:
        OSError: it cannot be made.
    """
    place = Path(tempfile.gettempdir()) if folder is None else folder
    sweep(place)
    made = draft_of(place / name)
    made.mkdir(mode=0o700)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def is_draft(path: Path) -> bool:
    """Whether a name is one of `draft_of`: something that is being written, or was when its process died."""
    return _DRAFT.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove the drafts in a folder, files and folders, whose process is dead; links in it are never followed.

    Of a process on another machine, and of a version that did not say whose a draft is, nothing is known: theirs go
    when nothing in them has changed for a day. What cannot be removed stays.
    """
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            named = _DRAFT.fullmatch(path.name)
            if not named and not _SHARDS_0_1.fullmatch(path.name):
                continue
            with suppress(OSError):
                if named and named[1] == _machine():
                    dead = not _lives(int(named[2]), int(named[3]))
                else:
                    dead = _age_s(path) > ABANDONED_S
                if dead:
                    clear_place(path)


@cache
def _machine() -> str:
    """Eight digits of this machine, or of the container whose process numbers are its own."""
    with suppress(OSError):
        return _digits(f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}")
    return _digits(socket.gethostname())


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _began(process: int) -> int | None:
    """When a process began, in ticks since the machine did; None where nothing says it, 0 for one that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])  # ended, and its parent has not asked yet
    except (OSError, ValueError, IndexError):
        return None


def _lives(process: int, began: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # somebody else's
    return _began(process) in (None, began)


def _age_s(path: Path) -> float:
    """Seconds since the last change of a file, or of a folder and what lies directly in it."""
    inside = list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
    return time.time() - max(each.lstat().st_mtime for each in (path, *inside))


def clear_place(path: Path) -> None:
    """Remove what lies at `path`: a link itself, never what it leads to, or a folder as a whole; nothing is fine too.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def readable_as_umask(folder: Path) -> None:
    """Give the files of a folder that was just written the permissions of the umask: safetensors writes them 0600."""
    probe = write_whole(folder / f".umask.{uuid4().hex}", "")
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces of 4 MiB (about a gigabyte a second)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
    return digest.hexdigest()


Json = dict[str, Any]
MAX_NUMBER = 2**63 - 1
_MAX_DEPTH = 32


def leads_out(path: Path, folder: Path | None = None) -> bool:
    """Whether a path leads out of a folder by a link: its own, or that of a folder on the way.

    What it says may be shown on a page that is published, so that a stranger's folder could ask for a file of whoever
    opens it. A snapshot of the hub, whose files are links into the `blobs` beside `snapshots`, stays inside. Links
    that `folder` itself or those above it are don't count: where a user keeps a folder is the user's business.

    Args:
        path: the file or folder.
        folder: one above it, to stay in; None = the one that it lies in.
    """
    if folder is None and not path.is_symlink():
        return False
    target, inside = Path(os.path.realpath(path)), (folder or path.parent).resolve()
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    return not (target.is_relative_to(inside) or target.is_relative_to(blobs))


def read_plain(path: Path, *, max_bytes: int, links: bool = False, within: Path | None = None) -> bytes:
    """The content of a file that anybody may have put there.

    Args:
        path: the file.
        max_bytes: the most that it may have; no more is read.
        links: whether it may be a link out of its folder, as the files of a model that the user keeps elsewhere.
        within: the folder that it may not lead out of; None = the one that it lies in.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no plain file, a link out of its folder, or larger than `max_bytes`.
    """
    if not links and leads_out(path, within):
        raise ValueError(f"{path} is a link out of its folder: put the file itself in its place")
    # without waiting: to open a pipe is to wait for whoever writes to it
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode):
        os.close(number)
        raise ValueError(f"{path} is not a plain file: put the file itself in its place")
    with open(number, "rb") as file:
        content = file.read(max_bytes + 1) if found.st_size <= max_bytes else b""
        size = max(found.st_size, len(content))
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes, more than the {max_bytes} that such a file may have")
    return content


def read_json(path: Path, *, max_bytes: int = 16 << 20, links: bool = False) -> Any:
    """Read a JSON file that anybody may have written. Values that are not finite pass: whoever needs numbers checks.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: as `read_plain`; it is not UTF-8, not JSON, names a key twice in one object, or nests deeper than 32
            levels.
    """
    content = read_plain(path, max_bytes=max_bytes, links=links)
    if content.startswith(codecs.BOM_UTF8):  # transformers and others, who read the same files, refuse it
        raise ValueError(
            f"{path} begins with a byte order mark, which JSON does not have: save it as UTF-8 without one"
        )
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error!s:.200}): restore it from a copy") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        values = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [inner for each in values for inner in each if isinstance(inner, (dict, list))]
        if not level:
            return value
    raise ValueError(f"{path} is nested deeper than {_MAX_DEPTH} levels: it is not a file that iskd wrote")


def read_object(file: Path, *, links: bool = False) -> Json:
    """Read a JSON object as `read_json` does; {} where there is no such file.

    Raises:
        OSError, ValueError: as `read_json`; it holds something else.
    """
    if not file.is_file():
        return {}
    found = read_json(file, links=links)
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold an object, got {type(found).__name__}: restore it from a copy")
    return found


def _once_each(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r:.80} stands twice in one object")
    return found


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 of the files' contents in order, in hex."""
    return hashlib.sha256(" ".join(file_sha256(file) for file in files).encode()).hexdigest()
