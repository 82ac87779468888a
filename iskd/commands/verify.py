"""`iskd verify DIR...`: reopen students in a clean process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from iskd.commands.arguments import told
from iskd.commands.paths import as_folder, dashed
from iskd.export import verify
from iskd.system import Busy


def main() -> None:
    """The command of this process."""
    if code := run(sys.argv[1:]):
        sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """The command line of `iskd verify`; returns its exit code: 0 passed, 1 failed, 2 not a student."""
    parser = argparse.ArgumentParser(prog="iskd verify", description="reopen exported students in a clean process")
    parser.add_argument("folder", nargs="+", type=as_folder, help="folder of a run or of an export")
    parser.add_argument("--reference", type=as_folder, help="compare with the student in this folder instead")
    parser.add_argument("--no-timing", action="store_true", help="leave prefill and decode unmeasured")
    asked: Any = parser.parse_args(dashed(parser, argv))
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
