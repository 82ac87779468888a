"""Which iskd this is, and how it was started: version, configuration, commit, command line. Imports nothing of iskd."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

__version__ = "0.1.0"

PACKAGE = Path(__file__).resolve().parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""In a wheel inside the package, in a checkout beside it."""

COMMAND = "ISKD_COMMAND"
"""Names the command where processes get the arguments without it: those that a multi-process run starts."""


def options(group: str) -> list[str]:
    """What can be chosen of a config group, e.g. of `data`, sorted; a file `_name.yaml` is only included by others."""
    return sorted(file.stem for file in (CONF / group).glob("[!_]*.yaml"))


def command_line() -> str | None:
    """The command that this process is, as it is pasted into a shell; None where Python code called iskd."""
    name = os.environ.get(COMMAND)
    return shlex.join(["iskd", name, *sys.argv[1:]]) if name else None


def commit() -> str | None:
    """The git commit of the checkout that iskd runs from, `-dirty` behind it where files differ; None of a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None
