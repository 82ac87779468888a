"""JSON to rows: an object a line, objects over several lines, an array of them, or one object that holds one list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from iskd.data.files.chat import ROWS, is_chat
from iskd.data.files.decoding import lines_of
from iskd.data.files.kinds import as_text

Row = tuple[str, Any]
"""Where it is, in words, and what it holds."""
_ITEM_CHARS = 1 << 28
_PIECE_CHARS = 1 << 20
_MARK = re.compile(r"[^ \t\r\n]")


def json_rows(file: Path, name: str, key: str) -> Iterator[Row]:
    """Yield the rows of a file; the arguments are those of `iskd.data.files.rows.rows_of`.

    Raises:
        ValueError: it is not JSON, or one object in which no list of rows is meant.
    """
    lines = ((number, line) for number, line in enumerate(lines_of(file), start=1) if line.strip())
    number, line = next(lines, (0, ""))
    if not number:
        return
    rest = (text for _, text in lines)
    if line.lstrip().startswith("["):
        yield from _items(file, chain([line], rest), key)
        return
    try:
        first = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        if not _goes_on(line):
            raise ValueError(_not_json(file, f"line {number}", error, key)) from error
        rows = _items(file, chain([line], rest), key)
    else:
        rows = chain([(f"{file}, line {number}", first)], _json_lines(file, lines, key))
    where, row = next(rows)
    second = next(rows, None)
    if second is None and isinstance(row, dict):
        yield from _inside(row, name, where)
        return
    yield where, row
    if second is not None:
        yield second
        yield from rows


def _goes_on(line: str) -> bool:
    """Whether a line is the beginning of an object that is written over several lines."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line.lstrip().startswith("{") and error.pos >= len(line.rstrip())
    except RecursionError:
        pass  # deeper than any row
    return False


def _json_lines(file: Path, lines: Iterator[tuple[int, str]], key: str) -> Iterator[Row]:
    for number, line in lines:
        try:
            yield f"{file}, line {number}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(_not_json(file, f"line {number}", error, key)) from error


def _not_json(file: Path, where: str, error: Exception, key: str) -> str:
    return f"{file}, {where} is not JSON ({error}); one object a line, or an array of them, is expected{as_text(key)}"


def _inside(row: dict[str, Any], name: str, where: str) -> Iterator[Row]:
    """The rows that the only object of a file holds: itself, its one list of objects, or its columns."""
    if isinstance(row.get(name), list) and all(isinstance(text, str | None) for text in row[name]):
        yield from ((f"{where}, {name}[{i}]", {name: text}) for i, text in enumerate(row[name]))
        return
    lists = [field for field, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    meant = None if _has(row, name) else _list_of(row, name)
    if not _has(row, name) and (len(lists) > 1 or (meant and meant[:1] != lists)):
        path = meant or lists[:1]
        steps = "".join(f"[{json.dumps(field)}]" for field in path)
        held = f"several lists, {lists}" if lists else f"a list further inside, {path}"
        fix = f"write the one that is meant to a file of its own (jq -c '.{steps}[]' FILE > FILE.jsonl)"
        raise ValueError(f"{where} is one object that holds {held}: {fix}")
    if _has(row, name) or not lists:
        yield where, row
        return
    yield from ((f"{where}, {lists[0]}[{i}]", value) for i, value in enumerate(row[lists[0]]))


def _has(row: Any, name: str) -> bool:
    if not isinstance(row, dict) or name != ROWS:
        return isinstance(row, dict) and name in row
    lists = (value for value in row.values() if isinstance(value, list) and value)
    return is_chat(row) and not any(isinstance(value[0], dict) and is_chat(value[0]) for value in lists)


def _list_of(row: dict[str, Any], name: str) -> list[str] | None:
    """The fields that lead to a list of rows that have the field `name`, the nearest one; None = there is none."""
    level: list[tuple[list[str], dict[str, Any]]] = [([], row)]
    while level:
        inside = [([*path, field], value) for path, each in level for field, value in each.items()]
        found = next(
            (path for path, value in inside if isinstance(value, list) and _has((value or [0])[0], name)), None
        )
        if found:
            return found
        level = [(path, value) for path, value in inside if isinstance(value, dict)]
    return None


def _items(file: Path, lines: Iterator[str], key: str) -> Iterator[Row]:
    """Values of a JSON array, or values one after another; of a file of many lines a piece is held at a time."""
    decoder, number = json.JSONDecoder(), 0
    buffer = next(lines)
    at = _next_mark(buffer, 0)
    inside = buffer[at] == "["
    at += inside
    while True:
        at = _next_mark(buffer, at)
        if inside and buffer.startswith("]", at):
            if buffer[at + 1 :].strip() or any(line.strip() for line in lines):
                raise ValueError(f"{file}: more follows behind its JSON array; write one object a line")
            return
        try:
            value, end = decoder.raw_decode(buffer, at)
            if inside:
                end = _behind_comma(buffer, end)
        except (json.JSONDecodeError, RecursionError) as error:
            # what is missing may stand in the next lines: twice as many each time, so that the work stays linear
            piece = _piece(lines, max(_PIECE_CHARS, len(buffer) - at)) if len(buffer) - at <= _ITEM_CHARS else ""
            if piece:
                buffer, at = buffer[at:] + piece, 0
                continue
            if not inside and at == len(buffer):
                return
            raise ValueError(_not_json(file, f"item {number + 1}", error, key)) from error
        at, number = end, number + 1
        yield f"{file}, item {number}", value


def _piece(lines: Iterator[str], size: int) -> str:
    taken: list[str] = []
    while size > 0 and (line := next(lines, None)) is not None:
        taken.append(line)
        size -= len(line)
    return "".join(taken)


def _next_mark(text: str, at: int) -> int:
    found = _MARK.search(text, at)
    return found.start() if found else len(text)


def _behind_comma(buffer: str, end: int) -> int:
    end = _next_mark(buffer, end)
    if not buffer.startswith((",", "]"), end):
        raise json.JSONDecodeError("Expecting ',' or ']'", buffer, end)
    return end + buffer.startswith(",", end)
