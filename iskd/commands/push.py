"""`iskd push DIR OWNER/NAME`: put an exported student on a model hub."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from iskd.commands.line import parse, told
from iskd.export.hub import push, upload_of
from iskd.system import Busy


def main(asked: Namespace) -> None:
    """List what would go up, and send it; exit code 2 where nothing can be sent."""
    with told():
        upload = upload_of(asked.folder, asked.repo, asked.include)
        print("\n".join(upload.lines()))
        if asked.dry_run:
            print("  nothing was sent")
            return
        with Busy(f"sending {asked.folder} to {asked.repo}"):
            place = push(upload, private=asked.private, revision=asked.revision, message=asked.message)
        print(f"  {place}")


def run(argv: Sequence[str]) -> None:
    """The command line of `iskd push`."""
    main(parse(["push", *argv]).values)
