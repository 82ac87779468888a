"""The console of everything that iskd prints: text comes out as it is, and tables fit without a broken word."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

_LOG_WIDTH = 120  # characters of a table in a file or a pipe
_NO_LIMIT = 10_000
_NAME = 12  # columns that the name of a row gets before others get theirs


def terminal(file: IO[str] | None = None) -> Console:
    """A console of rich that reads no markup: a folder `[/y]` or a stage `:x:` is no order to it.

    Args:
        file: where to write; None = standard output. It is as wide as `COLUMNS` says, else as the terminal that it may
            be.
    """
    columns = os.environ.get("COLUMNS", "")
    stream = sys.stdout if file is None else file
    wide = int(columns) if columns.isdecimal() and int(columns) else None if stream.isatty() else _LOG_WIDTH
    return Console(file=file, width=wide, markup=False, emoji=False, highlight=False)


def print_table(table: Table, *, spare: Sequence[str] = (), console: Console | None = None) -> None:
    """Print a table as wide as the console is, without breaking a word.

    Args:
        table: cells and heads are texts.
        spare: heads of columns that are left out, the first one first, where there is no room for all; said below.
        console: None = standard output.
    """
    console = console or terminal()
    left_out = _fit(table, console, list(spare))
    console.print(table)
    if left_out:
        said = f"left out here: {', '.join(left_out)} (COLUMNS=140 or a wider terminal shows all)"
        console.print(said, style="table.caption")


def _fit(table: Table, console: Console, spare: list[str]) -> list[str]:
    """Give columns their widths, where they would not all have what they want; the heads of those left out."""
    left_out = []
    while True:
        least, most = zip(*(_widths(column) for column in table.columns), strict=True)
        whole = Measurement.get(console, console.options.update(width=_NO_LIMIT), table).maximum
        room = console.width - (whole - sum(most))  # what is no border and no padding
        named = min(most[0], max(least[0], _NAME)) - least[0]  # a row's name is read and searched for in one piece
        if sum(least) + named <= room or not spare:
            break
        head = spare.pop(0)
        table.columns = [column for column in table.columns if _plain(column.header) != head]
        left_out.append(head)
    if sum(least) <= room < sum(most):
        widths, left = list(least), room - sum(least)
        widths[0] += max(min(named, left), min(most[0] - least[0], left // 2))
        for _ in range(room - sum(widths)):
            widths[max(range(len(widths)), key=lambda at: most[at] - widths[at])] += 1
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
    return left_out


def _widths(column: Column) -> tuple[int, int]:
    """The longest word and the longest line of a column."""
    texts = [str(column.header), *map(str, column.cells)]
    words, lines = (
        [word for text in texts for word in text.split()],
        [line for text in texts for line in text.split("\n")],
    )
    return max(map(len, words), default=0), max(map(len, lines), default=0)


def _plain(head: object) -> str:
    """A head in one line."""
    return str(head).replace("-\n", "").replace("\n", " ")


def caption(text: str) -> Text:
    """Text below a table as it is, whichever console prints that, in the style of such lines."""
    return Text(text, style="table.caption")


def title(text: str) -> Text:
    """Text above a table as it is, whichever console prints that, in the style of such lines."""
    return Text(text, style="table.title")
