"""`iskd curve OUT.png [NAME=]RUN_DIR...`: quality against depth of several runs in one picture."""

from __future__ import annotations

import sys
from pathlib import Path

from iskd.commands.config import RUN_HOLDS
from iskd.report import is_run, read_curve, write_curves


def main() -> None:
    """Write the picture and print its name."""
    if len(sys.argv) < 3:
        raise ValueError("usage: iskd curve OUT.png [NAME=]RUN_DIR...")
    named = [argument.rpartition("=") for argument in sys.argv[2:]]
    for folder in (Path(folder) for _, _, folder in named):
        if not is_run(folder):
            raise ValueError(f"{folder} is {'no run' if folder.is_dir() else 'no such folder'}; {RUN_HOLDS}")
    write_curves([read_curve(Path(folder), name or None) for name, _, folder in named], Path(sys.argv[1]))
    print(sys.argv[1])
