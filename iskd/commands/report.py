"""`iskd report DIR...`: report.html of one run again, or runs.html over several or a folder of runs."""

from __future__ import annotations

from argparse import Namespace

from iskd.commands.values.config import RUN_HOLDS
from iskd.report import is_run, write_report, write_runs_report
from iskd.report.runs_page import runs_file


def main(asked: Namespace) -> None:
    """Write the page and print its name."""
    folders = asked.folder
    if missing := [str(each) for each in folders if not each.is_dir()]:
        raise ValueError(f"no such folder: {', '.join(missing)}; {RUN_HOLDS}")
    if len(folders) == 1 and is_run(folders[0]):
        print(write_report(folders[0]))
    else:
        print(write_runs_report(folders, runs_file(folders)))
