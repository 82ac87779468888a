"""What a run failed with, in its folder until it is started again."""

from __future__ import annotations

import json
from pathlib import Path

from iskd.plan.run_files import FAILURE_FILE
from iskd.system import read_json, write_whole

_LONGEST = 2000  # characters


def write_failure(folder: Path, error: BaseException) -> Path:
    """Say in the folder of a run what ended it."""
    said = {"error": type(error).__name__, "message": str(error)[:_LONGEST]}
    return write_whole(folder / FAILURE_FILE, json.dumps(said, indent=1))


def read_failure(folder: Path) -> str | None:
    """What ended a run, in one line, or None; anybody may have written the file."""
    file = folder / FAILURE_FILE
    try:
        found = read_json(file, max_bytes=1 << 16)
        kind, message = str(found["error"]), " ".join(str(found["message"]).split())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"{FAILURE_FILE} cannot be read"
    return "".join(letter for letter in f"{kind[:80]}: {message[:_LONGEST]}" if letter.isprintable())
