"""Structure that a text shows in its first lines, whatever its suffix: rows of JSON, a table, markup of some kind.

A text that merely begins as one of them does (a poem, LaTeX, code, a list) stays text: it is JSON only where it is so
as far as the look goes, and a table only where every line has as many cells.
"""

from __future__ import annotations

import csv
import json
import re
from typing import Any

# by name; or an element that holds another, or all of the text
_XML = re.compile(
    r"<(\?xml|!doctype|!--|html\b|mediawiki\b|doc id=|([a-z][\w.:-]*)(\s[^<>]*)?>\s*(<[a-z!]|.*</\2\s*>\s*\Z))",
    re.I | re.S,
)
_BEGINNINGS = {
    "HTML or XML": _XML,
    "RTF": re.compile(r"\{\\rtf"),
    "subtitles": re.compile(r"WEBVTT\b|\d+\n[\d:]+[,.]\d{3} --> [\d:]+[,.]\d{3}"),
    "a web archive (WARC)": re.compile(r"WARC/\d"),
    "PostScript": re.compile(r"%!PS\b"),
    "a bibliography (BibTeX)": re.compile(r"@\w+\s*\{\s*[\w:./+-]+\s*,\s*\w+\s*="),
    "SQL": re.compile(
        r"(?:--[^\n]*\n|\s)*((CREATE|DROP) (TABLE|DATABASE)|INSERT INTO|PRAGMA \w+=|BEGIN TRANSACTION|/\*!\d+ )"
    ),
    "a mail box": re.compile(r"From \S+@\S+ +\w{3} \w{3} +\d|(Message-ID|Return-Path|Received): [^\n]*\n([\w-]+:)?\s"),
    "a calendar or an address book": re.compile(r"BEGIN:V(CALENDAR|CARD)\b"),
    "events with JSON in them": re.compile(r"data: ?[{\[]\s*[\"{]"),
    "Python's notation of rows and no JSON (json.dumps writes that)": re.compile(r"\[?\s*\{'[^'\n]+': *['\"\[{\d]"),
}
_LINES = {  # of which every line is
    "YAML": re.compile(r"(- |  )\s*[\w-]+:( .*)?"),
    "settings (INI or TOML)": re.compile(r"\[[\w. \"-]+\]|[\w.-]+ *= *\S.*|[#;].*"),
}
_MARKS = "\t,;|"
_TABLE_ROWS = 3
_MARKUP_LINES = 3


def rows_in(look: str, whole: bool) -> str | None:
    """The kind of rows that a text of no such suffix holds, of `iskd.data.files.kinds.KINDS`; None = it is no rows.

    Args:
        look: its beginning, without space in front.
        whole: whether that is all of it.
    """
    if _is_json(look, whole):
        return "jsonl"
    lines = [line for line in look.split("\n") if line.strip()]
    mark = next((mark for mark in _MARKS if lines and mark in lines[0] and _parted(lines, mark, whole)), None)
    return None if mark is None else "tsv" if mark == "\t" else "csv"


def markup_in(look: str, whole: bool) -> str | None:
    """The name of what a text is beside prose and rows, for a sentence; None = it is prose, notes or code."""
    begins = next((name for name, pattern in _BEGINNINGS.items() if pattern.match(look)), None)
    if begins:
        return begins
    lines = [line.rstrip() for line in look.split("\n")[: None if whole else -1] if line.strip()]
    if len(lines) < _MARKUP_LINES or lines[0][:1] not in ("-", "["):
        return None
    return next((name for name, pattern in _LINES.items() if all(map(pattern.fullmatch, lines))), None)


def _parted(lines: list[str], mark: str, whole: bool) -> bool:
    """Whether every row has as many cells by this mark, two or more."""
    try:
        # a cell in quotes may hold marks and line ends, and be cut at the end of the look
        rows = list(csv.reader((f"{line}\n" for line in lines), delimiter=mark))[: None if whole else -1]
    except csv.Error:
        return False
    if mark == "\t" and len({len(row) for row in rows}) > 1:  # many write quotes into such cells as they stand
        rows = [line.split(mark) for line in lines][: None if whole else -1]
    if len(rows) < _TABLE_ROWS - (not whole) or len(rows[0]) < 2 or len({len(row) for row in rows}) > 1:
        return False
    if mark == "\t":  # indented code begins with them
        return not any(line.startswith(mark) for line in lines)
    # in prose a space follows a comma, and in code nothing may follow a semicolon
    return any(row[-1] for row in rows) and not any(cell[:1].isspace() for row in rows for cell in row[1:])


def _is_json(look: str, whole: bool) -> bool:
    """Whether text that is of no JSON suffix begins with a JSON object, or an array of more than numbers."""
    if look[:1] not in ("{", "["):
        # rows below a line of something else: whoever reads rows names that line
        return all(map(_is_row, look.split("\n")[1:3])) and look.count("\n") > 2
    if _begins_json(look, whole):
        return True
    # a first line that is broken makes no prose of the others
    lines = look.split("\n")[1:] if look.startswith("{") else []
    return any(_is_row(line) for line in lines[: 20 if whole else len(lines) - 1][:20])


def _is_row(line: str) -> bool:
    try:
        return line.startswith("{") and bool(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _begins_json(look: str, whole: bool) -> bool:
    try:
        value, end = json.JSONDecoder().raw_decode(look)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        # as far as the look goes it is JSON: what is missing lies behind it, or was torn off
        open_end = error.msg.startswith("Unterminated string") or error.pos >= len(look.rstrip()) - (0 if whole else 8)
        return open_end and re.match(r'\{\s*"|\[\s*[{\["]', look) is not None and (not whole or '":' in look)
    rest = look[end:].lstrip(" \t\r")
    return _has_rows(value) and (not rest or rest[0] in "\n{[")


def _has_rows(value: Any) -> bool:
    if not isinstance(value, list):
        return bool(value)
    return any(_has_rows(item) if isinstance(item, list) else isinstance(item, dict | str) for item in value)
