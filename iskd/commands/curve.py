"""`iskd curve OUT.png [NAME=]RUN_DIR...`: quality against depth of several runs in one picture."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from iskd.commands.line.parser import as_folder
from iskd.commands.values.config import RUN_HOLDS
from iskd.report import is_run, read_curve, write_curves


def main(asked: Namespace) -> None:
    """Write the picture and print its name."""
    named, out = [_named(argument) for argument in asked.runs], asked.out
    for _, run in named:
        if not is_run(run):
            raise ValueError(f"{run} is {'no run' if run.is_dir() else 'no such folder'}; {RUN_HOLDS}")
    write_curves([read_curve(run, name) for name, run in named], out)
    print(out)


def _named(argument: str) -> tuple[str | None, Path]:
    """Name and folder; an = may be in either."""
    cuts = [0, *(place + 1 for place, sign in enumerate(argument) if sign == "=")]
    there = (cut for cut in cuts if as_folder(argument[cut:]).is_dir() and argument[cut:])
    cut = next(there, cuts[-1])
    return argument[: max(0, cut - 1)] or None, as_folder(argument[cut:])
