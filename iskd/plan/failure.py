"""What a run failed with, in its folder until it is started again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from iskd.plan.run_files import FAILURE_FILE
from iskd.system import read_json, write_whole

_LONGEST = 2000  # characters


def write_failure(folder: Path, error: BaseException) -> Path:
    """Say in the folder of a run what ended it."""
    said = {"error": type(error).__name__, "message": str(error)[:_LONGEST]}
    return write_whole(folder / FAILURE_FILE, json.dumps(said, indent=1))


@contextmanager
def told_in(folder: Path) -> Iterator[None]:
    """Say in the folder of a run what ended it, where an error does; for whoever holds the run's lock."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # a full disk
            write_failure(folder, error)
        raise


def in_a_line(kind: str, message: str) -> str:
    """An error as a line of a list, as `read_failure` tells it."""
    said = f"{kind[:80]}: {' '.join(message.split())[:_LONGEST]}"
    return "".join(letter for letter in said if letter.isprintable())


def read_failure(folder: Path) -> str | None:
    """What ended a run, in one line, or None; anybody may have written the file."""
    file = folder / FAILURE_FILE
    try:
        found = read_json(file, max_bytes=1 << 16)
        return in_a_line(str(found["error"]), str(found["message"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"{FAILURE_FILE} cannot be read"
