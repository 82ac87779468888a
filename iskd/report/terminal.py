"""The console of everything that iskd prints: text comes out as it is, whatever names and folders hold."""

from __future__ import annotations

import sys
from typing import IO

from rich.console import Console
from rich.text import Text

_LOG_WIDTH = 120  # characters of a table in a file or a pipe


def terminal(file: IO[str] | None = None) -> Console:
    """A console of rich that reads no markup: a folder `[/y]` or a stage `:x:` is no order to it.

    Args:
        file: where to write; None = standard output, as wide as the terminal that it may be.
    """
    wide = None if file is None and sys.stdout.isatty() else _LOG_WIDTH
    return Console(file=file, width=wide, markup=False, emoji=False, highlight=False)


def caption(text: str) -> Text:
    """Text below a table as it is, whichever console prints that, in the style of such lines."""
    return Text(text, style="table.caption")


def title(text: str) -> Text:
    """Text above a table as it is, whichever console prints that, in the style of such lines."""
    return Text(text, style="table.title")
