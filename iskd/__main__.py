"""`iskd COMMAND ...` or `python -m iskd COMMAND ...`: each command is the `main` of its file in `iskd.commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from iskd.commands.arguments import arguments, told
from iskd.commands.train import COMMAND
from iskd.system import global_rank
from iskd.system.allocator import tune
from iskd.system.stop_signals import INTERRUPTED

HYDRA = ("train", "score", "evaluate", "profile")
"""They read Hydra's overrides; the others read folders."""
COMMANDS = (*HYDRA, "report", "curve", "verify", "generate", "push")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `iskd` command.

    Args:
        argv: the command and what follows it; None = of this process. A process that a multi-process run starts has
            only what follows: its command is in the environment.
    """
    tune()  # before a model is there
    if argv is not None:
        sys.argv[1:] = argv
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        os.environ[COMMAND] = sys.argv.pop(1)
    name = os.environ.get(COMMAND)
    if name not in COMMANDS:
        with told():
            raise ValueError(f"usage: iskd COMMAND ...; commands: {', '.join(COMMANDS)}")
    try:
        if name in HYDRA:
            sys.argv[1:] = arguments(sys.argv[1:])
        with told():
            import_module(f"iskd.commands.{name}").main()
    except KeyboardInterrupt:  # a run that trains saves first, and says so
        if global_rank() == 0:
            print("stopped by Ctrl-C: nothing was to be saved", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
