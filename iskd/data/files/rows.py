"""Files of rows to texts: JSON (`json_rows`), tables with a header, parquet and arrow.

Every row comes with its place in words, and a row without the text that was asked for is refused by it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from iskd.data.files.chat import ROWS, conversation, is_chat
from iskd.data.files.decoding import lines_of
from iskd.data.files.json_rows import Row, json_rows
from iskd.data.files.kinds import as_text

_CELL_CHARS = 1 << 30
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
        "jsonl": json_rows,
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
        if isinstance(row[name], list) and row[name] and all(type(each) is int for each in row[name]):
            fix = "these are tokens: write the text that they were made of (docs/data.md)"
        if isinstance(row[name], bytes):
            fix = f"decode it, in pandas table[{name!r}] = table[{name!r}].str.decode('utf-8')"
        raise ValueError(f"{where}: field {name!r} is {type(row[name]).__name__}, not text; {fix}")
    return str(row[name])


def _no_field(name: str, names: list[str], where: str, key: str) -> str:
    shown = f"{names}" if len(names) <= 30 else f"{names[:30]} and {len(names) - 30} more"
    fix = f"set {key}.field to one of them"
    if key == "eval.text":
        fix = "eval.text reads no other: rename the field, or write its texts to a .txt file (blank lines apart)"
    elif "input_ids" in names:
        fix = f"{fix}; input_ids are tokens: write the text that they were made of (docs/data.md)"
    elif is_chat(names):
        fix = f"{fix}, or for chats data.chat.loss=assistant (or all)"
    return f"{where} has no field {name!r}, only {shown}; {fix}"


def _csv(file: Path, name: str, key: str, marks: str) -> Iterator[Row]:
    lines = lines_of(file)
    head = next((line for line in lines if line.strip()), None)
    if head is None:
        return
    # the separator is the one by which the header has the field; a list of semicolons is csv in half of the world
    mark = next((each for each in marks if name in next(csv.reader([head], delimiter=each))), None)
    mark = mark or max(marks, key=head.count)
    taken: list[str] = []  # lines of the row that is read
    reader = csv.reader(_noted(chain([head], lines), taken), delimiter=mark, strict=True)
    names: list[str] = []
    while True:
        try:
            cells = _next_cells(reader)
        except csv.Error as error:
            fix = f'a cell that holds quotes stands in quotes, with each of its own doubled (""){_as_they_stand(mark)}'
            raise ValueError(f"{file}, line {reader.line_num} is not {mark!r}-separated ({error}); {fix}") from error
        if cells is None:
            return
        if not names:
            names = [cell.strip() for cell in cells]
            fix = f", put the names of its columns in a line above it if these are none{as_text(key)}"
            if name != ROWS and name not in names:
                raise ValueError(_no_field(name, names, f"{file}, line {reader.line_num},", key) + fix)
            taken.clear()
            if len({*names}) < len(names):
                raise ValueError(f"{file}: a name stands twice in its header {names}; rename one{fix}")
            continue
        where = f"{file}, line {reader.line_num}"
        if cells and len(cells) != len(names):
            fix = "quote cells that hold separators or line ends"
            raise ValueError(f"{where} has {len(cells)} cells where the header has {len(names)}: {names}; {fix}")
        # prose seldom holds these marks: such a cell is several rows whose quotes are text
        rows = [line for line in taken if line.strip()] if mark in "\t|" and len(names) > 1 else []
        if len(rows) > 1 and all(line.count(mark) + 1 == len(names) for line in rows):
            first = f"{file}, lines {reader.line_num - len(taken) + 1} to {reader.line_num}"
            fix = f"if a table, take the {mark!r} out of that cell{_as_they_stand(mark)}"
            raise ValueError(f"{first} are one row by their quotes and {len(rows)} rows without; {fix}")
        taken.clear()
        if cells:
            yield where, dict(zip(names, cells, strict=True))


def _as_they_stand(mark: str) -> str:
    """How to read a table whose quotes are text, as many with tabs are."""
    if mark not in "\t|":
        return ""
    read = f"pandas.read_csv(FILE, sep={mark!r}, quoting=3)"
    return f"; if its quotes are text: {read}.to_json('FILE.jsonl', orient='records', lines=True)"


def _noted(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


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
