"""`iskd push DIR OWNER/NAME`: put an exported student on a model hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from iskd.commands.arguments import told
from iskd.commands.paths import as_folder, dashed
from iskd.export.hub import push, upload_of
from iskd.system import Busy


def main() -> None:
    """The command of this process."""
    run(sys.argv[1:])


def run(argv: Sequence[str]) -> None:
    """The command line of `iskd push`; exit code 2 where nothing can be sent."""
    parser = argparse.ArgumentParser(prog="iskd push", description="put an exported student on the Hugging Face Hub")
    parser.add_argument("folder", type=as_folder, help="folder of a run or of an export")
    parser.add_argument("repo", help="where to: OWNER/NAME; made where it is not there yet")
    parser.add_argument("--dry-run", action="store_true", help="list what would go up, check it, and send nothing")
    parser.add_argument("--private", action="store_true", help="make a place that nobody else sees")
    parser.add_argument("--revision", help="a branch instead of main")
    parser.add_argument("--message", default="", help="of the commit")
    asked: Any = parser.parse_args(dashed(parser, argv))
    with told():
        upload = upload_of(asked.folder, asked.repo)
        print("\n".join(upload.lines()))
        if asked.dry_run:
            print("  nothing was sent")
            return
        with Busy(f"sending {asked.folder} to {asked.repo}"):
            place = push(upload, private=asked.private, revision=asked.revision, message=asked.message)
        print(f"  {place}")
