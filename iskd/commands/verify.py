"""`iskd verify DIR...`: reopen students in a clean process."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from iskd.commands.line import parse, told
from iskd.export import verify
from iskd.system import Busy


def main(asked: Namespace) -> None:
    """Print what was found of every folder; the exit code is 1 where one failed, 2 where one is no student."""
    if code := _verified(asked):
        sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """The command line of `iskd verify`; returns its exit code: 0 passed, 1 failed, 2 not a student."""
    return _verified(parse(["verify", *argv]).values)


def _verified(asked: Namespace) -> int:
    codes = []
    for folder in asked.folder:
        try:
            with told(), Busy(f"opening {folder} in a clean process"):
                found = verify(folder, asked.reference, timed=not asked.no_timing)
        except SystemExit:  # the other folders are looked at all the same
            codes.append(2)
        else:
            print("\n".join(found.lines()))
            codes.append(int(not found.passed))
    return max(codes)
