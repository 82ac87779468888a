"""`iskd report DIR...`: report.html of one run again, or runs.html over several or a folder of runs."""

from __future__ import annotations

import sys
from pathlib import Path

from iskd.commands.config import RUN_HOLDS
from iskd.report import is_run, write_report, write_runs_report
from iskd.report.runs_page import runs_file


def main() -> None:
    """Write the page and print its name."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        raise ValueError("usage: iskd report RUN_DIR...")
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ValueError(f"no such folder: {', '.join(missing)}; {RUN_HOLDS}")
    if len(folders) == 1 and is_run(folders[0]):
        print(write_report(folders[0]))
    else:
        print(write_runs_report(folders, runs_file(folders)))
