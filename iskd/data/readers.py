"""Files to documents: plain text, JSON lines and parquet, the first two also gzipped; every error names the file."""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from iskd.data.chat import ROWS, conversation

FORMATS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
# Read as prose these would be markup, columns or noise.
_REFUSED = {
    ".arrow",
    ".csv",
    ".tsv",
    ".html",
    ".htm",
    ".xml",
    ".pdf",
    ".docx",
    ".zip",
    ".tar",
    ".bz2",
    ".xz",
    ".zst",
    ".7z",
}
_GROUP_CHARS = 1_000
_GROUP_CHARS_MAX = 10_000


def find_files(path: str, key: str) -> list[Path]:
    """Files that a path names: itself, the known formats inside a folder, or the matches of a glob.

    Args:
        path: file, folder or glob; `~` is the home folder.
        key: the option that holds it, for errors.

    Raises:
        ValueError: there is no such file.
    """
    target = Path(path).expanduser()
    if target.is_file():
        return [target]
    if target.is_dir():
        known = [file for file in sorted(target.rglob("*")) if file.is_file() and _suffix(file).lower() in FORMATS]
        if not known:
            raise ValueError(
                f"{key}={path}: the folder has no .txt, .json, .jsonl, .ndjson or .parquet file; name a file or a glob"
            )
        return known
    found = [Path(name) for name in sorted(glob.glob(str(target), recursive=True)) if Path(name).is_file()]
    if not found:
        raise ValueError(f"{key}={path} does not exist (from folder {Path.cwd()}); give a file, a folder or a glob")
    return found


def _suffix(file: Path) -> str:
    return (Path(file.stem) if file.suffix == ".gz" else file).suffix


def read_file(file: Path, fmt: str, field: str) -> Iterator[str]:
    """Yield the documents of one file, without blank ones.

    Args:
        file: the file; one that ends in .gz is unpacked on the way.
        fmt: a value of `FORMATS`, or `auto`: by suffix, where unknown suffixes are text.
        field: where a JSON line or a parquet row keeps its text.

    Raises:
        ValueError: the content is not of this format, or lacks the field.
    """
    if fmt == "auto" and _suffix(file).lower() in _REFUSED:
        fix = "convert it to .jsonl, .parquet or .txt, or say what it is by data.source.fmt"
        raise ValueError(f"{file}: {_suffix(file)} files are not read; {fix}")
    fmt = FORMATS.get(_suffix(file).lower(), "text") if fmt == "auto" else fmt
    if fmt == "parquet":
        return _parquet(file, field)
    if field == ROWS and fmt == "text":
        raise ValueError(f"{file} is read as plain text, and chats are rows: give .jsonl or .parquet (data.source.fmt)")
    return _jsonl(file, field) if fmt == "jsonl" else group_lines(_lines(file))


def _lines(file: Path) -> Iterator[str]:
    try:
        codec = "utf-8-sig"
        with gzip.open(file, "rt", encoding=codec) if file.suffix == ".gz" else file.open(encoding=codec) as lines:
            for line in lines:
                if "\0" in line:
                    raise ValueError(f"{file} is binary (it holds NUL bytes); give a text, .jsonl or .parquet file")
                yield line
    except UnicodeDecodeError as error:
        fix = "give a text file, or convert it to UTF-8 (iconv -t utf-8)"
        raise ValueError(
            f"{file} is not UTF-8 text ({error.reason}, byte {error.object[error.start]:#x}); {fix}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a whole gzip file ({error}); fetch it again") from error


def group_lines(lines: Iterable[str]) -> Iterator[str]:
    """Join lines up to a blank one once the group is large enough; a long run without blank lines is cut at a line."""
    group: list[str] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line)
        if size >= (_GROUP_CHARS_MAX if line.strip() else _GROUP_CHARS):
            yield from _nonblank("".join(group))
            group, size = [], 0
    yield from _nonblank("".join(group))


def _nonblank(text: str) -> Iterator[str]:
    if text.strip():
        yield text.strip()


def _jsonl(file: Path, name: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            fix = "write one object a line (jq -c '.[]' FILE > FILE.jsonl)"
            raise ValueError(f"{file}, line {number} begins a JSON array, where one JSON object a line is read; {fix}")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            fix = "one JSON object a line is expected; for plain text set data.source.fmt=text"
            raise ValueError(f"{file}, line {number} is not JSON ({error!s:.200}); {fix}") from error
        yield from _nonblank(text_of(row, name, f"{file}, line {number}"))


def _parquet(file: Path, name: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{file} needs the package pyarrow; pip install pyarrow, or convert it to .jsonl") from error
    try:
        table = ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file ({error}); set data.source.fmt to what it is") from error
    if name != ROWS and name not in table.schema_arrow.names:
        raise ValueError(_no_field(name, table.schema_arrow.names, str(file)))
    for batch in table.iter_batches(columns=None if name == ROWS else [name]):
        for row in batch.to_pylist():
            yield from _nonblank(text_of(row, name, str(file)))


def text_of(row: Any, name: str, where: str) -> str:
    """Return field `name` of a row; `where` names the row in the ValueError of a row without such a text."""
    if name == ROWS:
        return conversation(row, where)
    if not isinstance(row, dict) or name not in row:
        raise ValueError(_no_field(name, list(row) if isinstance(row, dict) else [], where))
    if not isinstance(row[name], str):
        raise ValueError(f"{where}: field {name!r} is {type(row[name]).__name__}, not text; set data.source.field")
    return str(row[name])


def _no_field(name: str, names: list[str], where: str) -> str:
    fix = "set data.source.field to one of them"
    if "messages" in names or {"prompt", "completion"} <= {*names}:
        fix = f"{fix}, or for chats data.chat.loss=assistant (or all)"
    return f"{where} has no field {name!r}, only {names}; {fix}"


def detokenize_wikitext(text: str) -> str:
    """Undo the word-level spacing of WikiText (Merity et al. 2016): ` @-@ `, spaced punctuation, brackets, quotes."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r"(?<=\S) '(s|t|re|ve|ll|d|m)\b", r"'\1", text)
    text = re.sub(r"(?<= )' ([^'\n]*?) '(?=[ ,.;:!?])", r"'\1'", text)
    text = re.sub(r"([$\u00a3\u20ac]) (?=\d)", r"\1", text)
    while "= =" in text:
        text = text.replace("= =", "==")
    return "\n".join(line.strip() for line in text.split("\n"))
