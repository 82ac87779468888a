"""Files of rows to texts: JSON (lines, arrays, objects that hold one list), tables with a header, parquet and arrow.

Every row comes with its place in words, and a row without the text that was asked for is refused by it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from iskd.data.files.chat import ROWS, conversation
from iskd.data.files.decoding import lines_of
from iskd.data.files.kinds import as_text

Row = tuple[str, Any]
"""Where it is, in words, and what it holds."""
_CELL_CHARS = 1 << 30
_ITEM_CHARS = 1 << 28
_PIECE_CHARS = 1 << 20
_MARK = re.compile(r"[^ \t\r\n]")
_UNREADABLE = "fetch it again, or convert it to .jsonl"


def rows_of(file: Path, kind: str, name: str, key: str) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        file: the file.
        kind: of `iskd.data.files.kinds.KINDS`, but `text`.
        name: the field that will be asked for; `ROWS` = all.
        key: the option that holds `fmt` and `field` (`data.source`), or one without them (`eval.text`); for errors.

    Raises:
        ValueError: the file is damaged, or has no such field.
    """
    readers: dict[str, Callable[[Path, str, str], Iterator[Row]]] = {
        "jsonl": _json,
        "csv": partial(_csv, marks=",;\t|"),
        "tsv": partial(_csv, marks="\t"),
        "parquet": _parquet,
        "arrow": _arrow,
    }
    return readers[kind](file, name, key)


def text_of(row: Any, name: str, where: str, key: str = "data.source") -> str:
    """Return field `name` of a row; `where` names the row in the ValueError of a row without such a text."""
    if name == ROWS:
        return conversation(row, where)
    if not isinstance(row, dict):
        fix = f'write each as {{{json.dumps(name)}: "..."}}, one a line'
        raise ValueError(f"{where} is {type(row).__name__}, not a row of fields, so it has no field {name!r}; {fix}")
    if name not in row:
        raise ValueError(_no_field(name, list(row), where, key))
    if row[name] is None:
        jq, pandas = f"jq -c 'select(.[{json.dumps(name)}] != null)' FILE", f"dropna(subset=[{name!r}])"
        fix = f"take such rows out: {jq}, in pandas {pandas}, in datasets filter(lambda row: row[{name!r}] is not None)"
        raise ValueError(f"{where}: field {name!r} is null; {fix}")
    if not isinstance(row[name], str):
        texts = [field for field, value in row.items() if isinstance(value, str)]
        fix = "write it as text" if key == "eval.text" or not texts else f"set {key}.field to one that is: {texts}"
        raise ValueError(f"{where}: field {name!r} is {type(row[name]).__name__}, not text; {fix}")
    return str(row[name])


def _no_field(name: str, names: list[str], where: str, key: str) -> str:
    shown = f"{names}" if len(names) <= 30 else f"{names[:30]} and {len(names) - 30} more"
    fix = f"set {key}.field to one of them"
    if key == "eval.text":
        fix = "eval.text reads no other: rename the field, or write its texts to a .txt file (blank lines apart)"
    elif "messages" in names or {"prompt", "completion"} <= {*names}:
        fix = f"{fix}, or for chats data.chat.loss=assistant (or all)"
    return f"{where} has no field {name!r}, only {shown}; {fix}"


def _json(file: Path, name: str, key: str) -> Iterator[Row]:
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
    chat = name == ROWS and any(field in row for field in ("messages", "prompt"))
    lists = [field for field, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if name in row or chat or not lists:
        yield where, row
        return
    if len(lists) > 1:
        raise ValueError(
            f"{where} is one object that holds several lists, {lists}: write the one that is meant to a file of its "
            f"own (jq -c '.[{json.dumps(lists[0])}][]' FILE > FILE.jsonl)"
        )
    yield from ((f"{where}, {lists[0]}[{i}]", value) for i, value in enumerate(row[lists[0]]))


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


def _csv(file: Path, name: str, key: str, marks: str) -> Iterator[Row]:
    lines = lines_of(file)
    head = next((line for line in lines if line.strip()), None)
    if head is None:
        return
    # the separator is the one by which the header has the field; a list of semicolons is csv in half of the world
    mark = next((each for each in marks if name in next(csv.reader([head], delimiter=each))), None)
    mark = mark or max(marks, key=head.count)
    reader = csv.reader(chain([head], lines), delimiter=mark, strict=True)
    names: list[str] = []
    while True:
        try:
            cells = _next_cells(reader)
        except csv.Error as error:
            fix = 'a cell that holds quotes stands in quotes, with each of its own doubled ("")'
            raise ValueError(f"{file}, line {reader.line_num} is not {mark!r}-separated ({error}); {fix}") from error
        if cells is None:
            return
        if not names:
            names = [cell.strip() for cell in cells]
            fix = f", put the names of its columns in a line above it if these are none{as_text(key)}"
            if name != ROWS and name not in names:
                raise ValueError(_no_field(name, names, f"{file}, line {reader.line_num},", key) + fix)
            if len({*names}) < len(names):
                raise ValueError(f"{file}: a name stands twice in its header {names}; rename one{fix}")
            continue
        where = f"{file}, line {reader.line_num}"
        if cells and len(cells) != len(names):
            fix = "quote cells that hold separators or line ends"
            raise ValueError(f"{where} has {len(cells)} cells where the header has {len(names)}: {names}; {fix}")
        if cells:
            yield where, dict(zip(names, cells, strict=True))


def _next_cells(reader: Any) -> list[str] | None:
    limit = csv.field_size_limit(_CELL_CHARS)  # of the whole process; documents are longer than cells of a table
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _parquet(file: Path, name: str, key: str) -> Iterator[Row]:
    arrow = _pyarrow(file)
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        if name != ROWS and name not in table.schema_arrow.names:
            raise ValueError(_no_field(name, table.schema_arrow.names, str(file), key))
        yield from _numbered(file, table.iter_batches(columns=None if name == ROWS else [name]))
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is not a parquet file, or damaged ({error}); {_UNREADABLE}") from error


def _arrow(file: Path, name: str, key: str) -> Iterator[Row]:
    arrow = _pyarrow(file)
    from pyarrow import ipc

    try:
        with arrow.memory_map(str(file)) as source:
            whole = source.read(6) == b"ARROW1"  # Feather and files; `datasets` writes streams
            source.seek(0)
            table: Any = ipc.open_file(source) if whole else ipc.open_stream(source)
            if name != ROWS and name not in table.schema.names:
                raise ValueError(_no_field(name, table.schema.names, str(file), key))
            batches = (table.get_batch(i) for i in range(table.num_record_batches)) if whole else table
            yield from _numbered(file, batches if name == ROWS else (batch.select([name]) for batch in batches))
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is not an arrow file, or damaged ({error}); {_UNREADABLE}") from error


def _numbered(file: Path, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # else Arrow believes what a damaged file tells, and reads beyond its end
        for row in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", row


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        fix = "pip install pyarrow (or iskd[data]), or convert it to .jsonl"
        raise ValueError(f"{file} needs the package pyarrow; {fix}") from error
    return pyarrow
