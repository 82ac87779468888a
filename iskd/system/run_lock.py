"""The lock of a run's folder: one process writes into it at a time, and the kernel lets go when that process dies.

A lock file alone cannot tell a living owner from a dead one; `flock` can, on every machine that sees the file. What is
written in the file only says who holds it. Rank 0 holds it for all processes of a run, as it writes for all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

from iskd.system.ranks import global_rank

HANDED_ON = "ISKD_RUN_LOCK"
"""Open file of the lock that a process left to the one in its place."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.EIO)
_MOST = 512  # bytes that say who
_held: dict[Path, int] = {}
_log = logging.getLogger(__name__)


class InUseError(ValueError):
    """Another process works in the folder, whose files are not this one's to write."""


def hold(file: Path) -> bool:
    """Hold a lock file until `release`, or as long as this process lives. Once held, it may be held again.

    On a file system without locks a warning is all.

    Returns:
        Whether this call took it, so that no run is under way in the folder; False where this process held it, or
        leaves it to another.

    Raises:
        InUseError: another process holds it; with its number, its machine and what to do.
        ValueError: it is no plain file.
        OSError: the file cannot be made.
    """
    place = file.resolve()
    if global_rank() != 0 or place in _held:
        return False
    opened = _handed_on(file)
    taken = opened is None
    if opened is None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            opened = os.open(file, flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise ValueError(f"{file} is not a plain file: delete it") from None
            raise
        if not _lock(opened, file):
            return True
    me = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(opened, 0)
    os.pwrite(opened, json.dumps(me).encode(), 0)
    _held[place] = opened
    return taken


def release(file: Path) -> None:
    """Let go of a lock file. It stays: deleting it would let two others in, each with a file of its own."""
    opened = _held.pop(file.resolve(), None)
    if opened is not None:
        os.close(opened)


def hand_on(file: Path, environment: MutableMapping[str, str]) -> None:
    """Leave a lock to the process that takes this one's place (`exec`), and say so in its environment."""
    opened = _held.get(file.resolve())
    if opened is not None:
        os.set_inheritable(opened, True)
        environment[HANDED_ON] = str(opened)


def _handed_on(file: Path) -> int | None:
    """The lock as the process before left it, if it is this one."""
    said = os.environ.pop(HANDED_ON, "")
    if not said.isdigit():
        return None
    with suppress(OSError):
        opened = int(said)
        if os.path.samestat(os.fstat(opened), file.stat()):
            os.set_inheritable(opened, False)
            return opened
    return None


def _lock(opened: int, file: Path) -> bool:
    """Lock an open file, False where the file system has no locks; it is closed where it is not locked."""
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise ValueError(f"{file} is not a plain file: delete it")
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(opened)
        os.close(opened)
        raise InUseError(
            f"{file.parent} is in use by {owner}: two processes would spoil each other's files. Wait until that one "
            "has ended, or end it (SIGTERM saves first), and give the same command again"
        ) from None
    except OSError as error:
        os.close(opened)
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning(
            "%s: this file system has no locks (%s): nothing keeps a second process out of this run, so start none",
            *(file.parent, error.strerror),
        )
        return False
    except ValueError:
        os.close(opened)
        raise
    return True


def _owner(opened: int) -> str:
    """Who holds a lock, from what anybody may have written into its file."""
    try:
        said = json.loads(os.pread(opened, _MOST, 0).decode())
        number, machine, since = int(said["process"]), str(said["machine"])[:80], str(said["since"])[:19]
    except (ValueError, TypeError, KeyError, OSError, OverflowError, RecursionError):
        return "another process"
    shown = "".join(letter for letter in f"process {number} on {machine}, since {since}" if letter.isprintable())
    return f"another run ({shown})"
