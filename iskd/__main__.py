"""`iskd COMMAND ...` or `python -m iskd COMMAND ...`: each command is the `main` of its file in `iskd.commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from iskd import know_students
from iskd.commands import check_installed
from iskd.commands.line import parse, told
from iskd.commands.line.commands import COMMANDS
from iskd.commands.line.completion import complete
from iskd.system import global_rank
from iskd.system.allocator import tune
from iskd.system.stop_signals import INTERRUPTED
from iskd.system.version import COMMAND

_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Variables by which other libraries draw no bars: in a file each of their moves would be a line."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `iskd` command.

    Args:
        argv: the command and what follows it; None = of this process. A process that a multi-process run starts has
            only what follows: its command is in the environment.
    """
    tune()  # before a model is there
    if argv is not None:
        sys.argv[1:] = argv
    try:
        with told():
            asked = parse(sys.argv[1:], os.environ.get(COMMAND, ""))
            if asked.command == "completion":
                complete(asked.values)
                return
            sys.argv[1:], os.environ[COMMAND] = asked.words, asked.command
            if not sys.stderr.isatty():
                for name in _BARS:
                    os.environ.setdefault(name, "1")
            try:
                check_installed()
            except ImportError as error:
                raise ValueError(str(error)) from None
            know_students()
            command = import_module(f"iskd.commands.{asked.command}")
            if COMMANDS[asked.command].composes:
                sys.argv[1:] = import_module("iskd.commands.arguments").arguments(sys.argv[1:])
                command.main()
            else:
                command.main(asked.values)
    except KeyboardInterrupt:  # a run that trains saves first, and says so
        if global_rank() == 0:
            print("stopped by Ctrl-C: nothing was to be saved", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
