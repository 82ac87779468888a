"""Rows that a text shows in its first lines, whatever its suffix: of JSON, or of a table.

A text that merely begins as one of them does (a poem, LaTeX, code, a list) stays text: it is JSON only where it is so
as far as the look goes, and a table only where every line has as many cells.
"""

from __future__ import annotations

import csv
import json
import re
from typing import Any

_MARKS = "\t,;|"
_TABLE_ROWS = 3
_ROWS_BEHIND = 20
# of a header that has spaces behind its commas, as prose has
_FIELDS = {"id", "text", "content", "body", "title", "label", "sentence", "document", "url", "date", "name", "source"}
_FIELDS |= {"author", "category", "score", "question", "answer", "prompt", "completion", "review", "summary", "index"}
_COMMENTS = re.compile(r"(\s*(//[^\n]*(\n|\Z)|/\*.*?\*/|#[^\n]*(\n|\Z)))+\s*", re.S)
_RULER = re.compile(r"[\s:-]*-[\s:-]*")  # of a table in Markdown
_HEADING = re.compile(r"[^\n{}\[\]]+\n\s*(?=[{\[]\s*[{\"])")


def rows_in(look: str, whole: bool) -> str | None:
    """The kind of rows that a text of no such suffix holds, of `iskd.data.files.kinds.KINDS`; None = it is no rows.

    Where something else stands above the rows it is their kind too: whoever reads them names that line.

    Args:
        look: its beginning, without space in front.
        whole: whether that is all of it.
    """
    if _is_json(look, whole):
        return "jsonl"
    # comments stand above a header, and between the sentences of tagged words
    lines = [line for line in look.split("\n") if line.strip() and not line.startswith("#")]
    mark = next((mark for mark in _MARKS if lines and mark in lines[0] and _parted(lines, mark, whole)), None)
    return None if mark is None else "tsv" if mark == "\t" else "csv"


def _parted(lines: list[str], mark: str, whole: bool) -> bool:
    """Whether every row has as many cells by this mark, two or more."""
    try:
        # a cell in quotes may hold marks and line ends, and be cut at the end of the look
        rows = list(csv.reader((f"{line}\n" for line in lines), delimiter=mark))[: None if whole else -1]
    except csv.Error:
        return False
    if mark == "\t" and len({len(row) for row in rows}) > 1:  # many write quotes into such cells as they stand
        rows = [line.split(mark) for line in lines][: None if whole else -1]
    if len(rows) < _TABLE_ROWS - (not whole) or len(rows[0]) < 2 or _RULER.fullmatch("".join(rows[1])):
        return False
    if {cell.strip().lower() for cell in rows[0]} <= _FIELDS:
        return all(len(row) >= len(rows[0]) for row in rows)
    if len({len(row) for row in rows}) > 1:
        return False
    if mark == "\t":  # indented code begins with them
        return not any(line.startswith(mark) for line in lines)
    # in prose a space follows a comma, and in code nothing may follow a semicolon
    return any(row[-1] for row in rows) and not any(cell[:1].isspace() for row in rows for cell in row[1:])


def _is_json(look: str, whole: bool) -> bool:
    """Whether text that is of no JSON suffix holds JSON objects, or an array of more than numbers."""
    lines = [line for line in look.split("\n")[: None if whole else -1] if line.strip()]
    if look[:1] not in ("{", "["):
        return _rows_below(lines) or _below(look, whole)
    if begins_json(look, whole):
        return True
    # a first line that is broken makes no prose of the others
    return look.startswith("{") and any(map(_is_row, lines[1:21]))


def _rows_below(lines: list[str]) -> bool:
    """Whether rows follow something else: at once, as most of it, or up to where the look ends."""
    rows = [_is_row(line) for line in lines]
    most = sum(rows) > max(1, len(rows) / 2)
    return most or (len(rows) > _ROWS_BEHIND and all(rows[-_ROWS_BEHIND:]))


def is_texts(look: str, whole: bool) -> bool:
    """Whether every line is a JSON text; without an escape in any they may be what people say in quotes.

    A table of one column looks the same, so this is nothing to ask of a file that says it is one.
    """
    lines = [line for line in look.split("\n")[: None if whole else -1] if line.strip()]
    if len(lines) < 2 or not all(line.startswith('"') for line in lines) or not any("\\" in line for line in lines):
        return False
    try:
        return all(isinstance(json.loads(line), str) for line in lines)
    except ValueError:
        return False


def _below(look: str, whole: bool) -> bool:
    """Whether all below comments or one heading is JSON."""
    heads = (pattern.match(look) for pattern in (_COMMENTS, _HEADING))
    return any(head is not None and begins_json(look[head.end() :], whole, torn=False) for head in heads)


def _is_row(line: str) -> bool:
    try:
        return line.startswith("{") and bool(json.loads(line))
    except (ValueError, RecursionError):
        return False


def begins_json(look: str, whole: bool, torn: bool = True) -> bool:
    """Whether a text is JSON with objects or texts in it, as far as the look goes.

    Args:
        look: beginning with a bracket, or it is none.
        whole: whether the look is all of the text.
        torn: whether the end of a text may be missing.
    """
    if look[:1] not in ("{", "["):
        return False
    try:
        value, end = json.JSONDecoder().raw_decode(look)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        # as far as the look goes it is JSON: what is missing lies behind it, or was torn off
        open_end = error.msg.startswith("Unterminated string") or error.pos >= len(look.rstrip()) - (0 if whole else 8)
        open_end = open_end and (torn or not whole)
        return open_end and re.match(r'\{\s*"|\[\s*[{\["]', look) is not None and (not whole or '":' in look)
    rest = look[end:].lstrip(" \t\r")
    return _has_rows(value) and (
        not rest or (rest[0] in "\n{[" and (torn or not rest.strip() or rest.lstrip()[0] in "{["))
    )


def _has_rows(value: Any) -> bool:
    if not isinstance(value, list):
        return bool(value)
    return any(_has_rows(item) if isinstance(item, list) else isinstance(item, dict | str) for item in value)
