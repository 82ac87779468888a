"""Tables as csv: written as `write_whole` does, read within limits, whatever somebody put into them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from iskd.system.files import read_plain, write_whole

MAX_BYTES = 256 << 20
_MAX_COLUMNS = 1_000
_MAX_CELL = 10_000  # characters
_FORMULAS = tuple("=+-@\t\r")


@dataclass(frozen=True)
class Table:
    """A table of text: its columns, its rows with one cell for each, and how many lines were no such row."""

    columns: list[str]
    rows: list[list[str]]
    skipped: int


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows of cells in the csv module's own dialect.

    A text that a spreadsheet would take for a formula gets an apostrophe in front; numbers, and texts that are one,
    stay.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_harmless(cell) for cell in row] for row in rows)
    return text.getvalue()


def write_csv(file: Path, rows: Iterable[Iterable[object]]) -> Path:
    """Write `csv_text` as `write_whole` does."""
    return write_whole(file, csv_text(rows))


def read_csv(path: Path, *, max_bytes: int = MAX_BYTES) -> Table:
    """Read a csv with a header that anybody may have written, a line a row.

    A line that is no row of the table is skipped and counted: one with more or fewer cells, a broken one, the last one
    where it has no end, since a writer was killed in it.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: as `iskd.system.files.read_plain`, or it has more than 1,000 columns, or two of one name.
    """
    lines = _lines(read_plain(path, max_bytes=max_bytes).decode("utf-8", errors="replace"))
    columns = _cells(next(lines, "")) or []
    if len(columns) > _MAX_COLUMNS or len(set(columns)) < len(columns):
        told = f"more than {_MAX_COLUMNS} columns" if len(columns) > _MAX_COLUMNS else "two columns of one name"
        raise ValueError(f"{path} has {told}: it is not a table that a run wrote")
    rows, skipped = list[list[str]](), 0
    for line in lines:
        cells = _cells(line)
        if cells is not None and len(cells) == len(columns):
            rows.append(cells)
        elif line.strip():
            skipped += 1
    return Table(columns, rows, skipped)


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends, which are line feeds alone."""
    at = 0
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        yield text[at:end]
        at = end


def _cells(line: str) -> list[str] | None:
    """The cells of a whole line, None where it has none."""
    if not line.endswith("\n") or "\0" in line:
        return None
    line = line.rstrip("\r\n")
    try:
        found = next(csv.reader([line], strict=True), []) if '"' in line else line.split(",")
    except csv.Error:
        return None
    return None if any(len(cell) > _MAX_CELL for cell in found) or found == [""] else found


def _harmless(cell: object) -> object:
    if not isinstance(cell, str) or not cell.lstrip(" ").startswith(_FORMULAS):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
