"""Where text comes from: sources of documents, and the rule that gives every document one split.

A source is a frozen dataclass with `documents()`, which yields (text, split) pairs, and `fingerprint()`, which changes
when its content does. A document with split None is placed by the SHA-256 of its text, so the same text is always in
the same split, whatever the order, the machine or the run. Documents with a split of their own come first.
"""

from __future__ import annotations

import ast
import glob
import gzip
import hashlib
import json
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

SPLITS = ("train", "validation", "calibration", "test")
Document = tuple[str, str | None]

_GROUP_CHARS = 1_000
_GROUP_CHARS_MAX = 10_000
_FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
_OFFLINE = "data=text data.path=FILE (local .txt, .jsonl or .parquet) or data=docstrings (needs no file)"


class Source(Protocol):
    """Anything that yields documents."""

    def documents(self) -> Iterator[Document]:
        """Yield (text, split or None); documents that carry a split come before those that do not."""
        ...

    def fingerprint(self) -> str:
        """Return a string that changes whenever the documents change; cheap compared with reading them."""
        ...


@dataclass(frozen=True)
class Docstrings:
    """Docstrings of the running interpreter's standard library and the topics of `help()`: about 2 MB of English.

    Args:
        min_chars: docstrings of at most this many characters are skipped.
        max_documents: stop after so many documents; None takes all.
    """

    min_chars: int = 80
    max_documents: int | None = None

    def documents(self) -> Iterator[Document]:
        """Yield docstrings in the order of sorted file paths, then the topics by name."""
        return islice(self._all(), self.max_documents)

    def _all(self) -> Iterator[Document]:
        for path in self._files():
            for text in _docstrings(path):
                if len(text) > self.min_chars:
                    yield text, None
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield topics[name].strip(), None

    def fingerprint(self) -> str:
        """Hash the interpreter's version and every source file."""
        return f"{sys.implementation.name}-{sys.version_info[:3]}-{_hash_files(self._files())}"

    def _files(self) -> list[Path]:
        root = sysconfig.get_paths()["stdlib"]
        skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        found: list[Path] = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name not in skipped)
            found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        return found


@dataclass(frozen=True)
class TextFiles:
    """Local files: plain text, JSON lines or parquet, each of the first two also gzipped.

    Plain text becomes documents at blank lines, in groups of at least about 1,000 characters: small enough for the
    hash splits to be fine-grained, large enough to hold context.

    Args:
        path: a file, a folder (its .txt, .jsonl, .parquet files, also .gz) or a glob.
        val_path: the same for validation; without it validation is a share of `path`.
        test_path: the same for the test split.
        fmt: `auto` (by suffix; unknown suffixes are text), `text`, `jsonl` or `parquet`.
        field: where a JSON line or a parquet row keeps its text.
        detokenize: `wikitext` undoes the word-level spacing of WikiText; None keeps the text as it is.
    """

    path: str
    val_path: str | None = None
    test_path: str | None = None
    fmt: str = "auto"
    field: str = "text"
    detokenize: str | None = None

    def __post_init__(self) -> None:
        """Check the options that have a fixed set of values."""
        if self.fmt not in ("auto", *_FORMATS.values()):
            raise ValueError(f"data.source.fmt={self.fmt!r} is unknown; use auto, {', '.join(_FORMATS.values())}")
        if self.detokenize not in (None, "wikitext"):
            raise ValueError(f"data.source.detokenize={self.detokenize!r} is unknown; use wikitext or null")

    def documents(self) -> Iterator[Document]:
        """Yield the documents of `val_path`, `test_path` and `path`, in that order.

        Raises:
            ValueError: a path is missing, empty, not text, or lacks the field.
        """
        for key, split in (("val_path", "validation"), ("test_path", "test"), ("path", None)):
            for file in self._files(key):
                empty = True
                for text in _read(file, _format(file, self.fmt), self.field):
                    empty = False
                    yield detokenize_wikitext(text) if self.detokenize else text, split
                if empty:
                    raise ValueError(f"data.source.{key}: {file} holds no text; remove it or point to another file")

    def fingerprint(self) -> str:
        """Hash the bytes of every file."""
        return "-".join(_hash_files(self._files(key)) for key in ("path", "val_path", "test_path"))

    def _files(self, key: str) -> list[Path]:
        value: str | None = getattr(self, key)
        return [] if value is None else _find(value, f"data.source.{key}")


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub (or a local folder in the same layout), read by the `datasets` library.

    Args:
        name: hub name, as `Salesforce/wikitext`.
        config: name of the configuration, where the data set has several.
        split: the part that is divided by hash.
        val_split: the part used whole for validation; None takes a share of `split`.
        test_split: the part used whole as test.
        field: the column that holds the text.
        max_documents: stream and stop after this many rows of `split`; None reads all of it through the local cache.
        revision: commit of the data set on the hub; the cache of tokens knows the content only by this name, so pin
            it where an exact rerun matters.
        detokenize: as in `TextFiles`.
        lines: rows are the lines of a running text (as WikiText's are) and are grouped as those of a text file.
    """

    name: str
    config: str | None = None
    split: str = "train"
    val_split: str | None = None
    test_split: str | None = None
    field: str = "text"
    max_documents: int | None = None
    revision: str | None = None
    detokenize: str | None = None
    lines: bool = False

    def __post_init__(self) -> None:
        """Check the options that have a fixed set of values."""
        if self.detokenize not in (None, "wikitext"):
            raise ValueError(f"data.source.detokenize={self.detokenize!r} is unknown; use wikitext or null")

    def documents(self) -> Iterator[Document]:
        """Yield rows that are not blank; validation and test rows first.

        Raises:
            ValueError: `datasets` is missing, the data set cannot be reached, or a row has no such field.
        """
        for part, split in ((self.val_split, "validation"), (self.test_split, "test"), (self.split, None)):
            if part is None:
                continue
            for text in self._texts(part, self.max_documents if split is None else None):
                yield detokenize_wikitext(text) if self.detokenize else text, split

    def fingerprint(self) -> str:
        """Name the data set, with a hash of the files where it is a local folder."""
        folder = Path(self.name)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
        return f"{self!r}-{_hash_files(files)}"

    def _texts(self, part: str, limit: int | None) -> Iterator[str]:
        rows = (_text_of(row, self.field, f"data.source.name={self.name}") for row in self._rows(part, limit))
        if self.lines:
            return _groups(row.rstrip("\n") + "\n" for row in rows)
        return (row for row in rows if row.strip())

    def _rows(self, part: str, limit: int | None) -> Iterator[Any]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            fix = f"pip install datasets, or use {_OFFLINE}"
            raise ValueError(f"data.source={self.name} needs the package datasets; {fix}") from error
        try:
            # Streaming spares the download of the rest; reading whole goes through the cache, which works offline.
            rows = load_dataset(self.name, self.config, split=part, revision=self.revision, streaming=limit is not None)
            iterator = iter(rows if limit is None else rows.take(limit))
            first = next(iterator, None)
        except Exception as error:
            what = f"data set {self.name!r} (config {self.config!r}, split {part!r}) could not be loaded: {error}"
            raise ValueError(f"{what}. Without a network use {_OFFLINE}") from error
        if first is not None:
            yield first
        yield from iterator


@dataclass
class Splitter:
    """Gives every document one split; no text is ever in two.

    A document's place is the first 64 bits of the SHA-256 of its text, read as a fraction of 2**64: [0, calibration)
    is calibration, the next share validation, the next test, the rest train. A split that the source provides itself
    takes no share, and a text that the source placed explicitly is dropped from wherever it appears later.

    Args:
        validation: share of validation in [0, 1).
        calibration: share of calibration.
        test: share of test.
    """

    validation: float = 0.04
    calibration: float = 0.04
    test: float = 0.0
    dropped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check that the shares leave something to train on."""
        shares = {name: float(getattr(self, name)) for name in SPLITS[1:]}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ValueError(f"data.{name}_fraction={share} is not a share; use a number in [0, 1)")
        if sum(shares.values()) >= 1:
            raise ValueError(f"the held-out shares {shares} leave nothing to train on; lower data.*_fraction")

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
        """Yield (text, split) for the documents that are kept; `dropped` counts the others.

        Raises:
            ValueError: a split is unknown, or a document with a split follows one without.
        """
        placed: dict[bytes, str] = {}
        bands: list[tuple[float, str]] | None = None
        self.dropped = 0
        for text, split in documents:
            digest = hashlib.sha256(_encode(text)).digest()
            if split is None:
                if bands is None:
                    bands = self._bands(set(placed.values()))
                place, keep = self._place(digest, bands), digest not in placed
            elif split not in SPLITS:
                raise ValueError(f"a document has split {split!r}; use one of {', '.join(SPLITS)} or None")
            elif bands is not None:
                raise ValueError(f"a source yielded split {split!r} after a document without one; yield it first")
            else:
                place, keep = split, placed.setdefault(digest, split) == split
            if keep:
                yield text, place
            else:
                self.dropped += 1

    def _bands(self, provided: set[str]) -> list[tuple[float, str]]:
        """Return (upper edge, split) in order; what the source provides itself has no band."""
        bands, edge = [], 0.0
        for name in ("calibration", "validation", "test"):
            if name not in provided:
                edge += getattr(self, name)
                bands.append((edge, name))
        return bands

    @staticmethod
    def _place(digest: bytes, bands: list[tuple[float, str]]) -> str:
        position = int.from_bytes(digest[:8], "big") / 2**64
        return next((name for edge, name in bands if position < edge), "train")


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


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and fixtures that are not Python of this version
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _find(path: str, key: str) -> list[Path]:
    target = Path(path).expanduser()
    if target.is_file():
        return [target]
    if target.is_dir():
        known = [file for file in sorted(target.rglob("*")) if file.is_file() and _suffix(file) in _FORMATS]
        if not known:
            raise ValueError(f"{key}={path}: the folder has no .txt, .jsonl or .parquet file; name a file or a glob")
        return known
    found = [Path(name) for name in sorted(glob.glob(str(target), recursive=True)) if Path(name).is_file()]
    if not found:
        raise ValueError(f"{key}={path} does not exist (from folder {Path.cwd()}); give a file, a folder or a glob")
    return found


def _suffix(file: Path) -> str:
    return (Path(file.stem) if file.suffix == ".gz" else file).suffix


def _format(file: Path, fmt: str) -> str:
    return _FORMATS.get(_suffix(file), "text") if fmt == "auto" else fmt


def _read(file: Path, fmt: str, name: str) -> Iterator[str]:
    if fmt == "parquet":
        return _parquet(file, name)
    return _jsonl(file, name) if fmt == "jsonl" else _groups(_lines(file))


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


def _groups(lines: Iterable[str]) -> Iterator[str]:
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
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            fix = "one JSON object a line is expected; for plain text set data.source.fmt=text"
            raise ValueError(f"{file}, line {number} is not JSON ({error}); {fix}") from error
        yield from _nonblank(_text_of(row, name, f"{file}, line {number}"))


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
    if name not in table.schema_arrow.names:
        raise ValueError(_no_field(name, table.schema_arrow.names, str(file)))
    for batch in table.iter_batches(columns=[name]):
        for row in batch.to_pylist():
            yield from _nonblank(_text_of(row, name, str(file)))


def _text_of(row: Any, name: str, where: str) -> str:
    if not isinstance(row, dict) or name not in row:
        raise ValueError(_no_field(name, list(row) if isinstance(row, dict) else [], where))
    if not isinstance(row[name], str):
        raise ValueError(f"{where}: field {name!r} is {type(row[name]).__name__}, not text; set data.source.field")
    return str(row[name])


def _no_field(name: str, names: list[str], where: str) -> str:
    return f"{where} has no field {name!r}, only {names}; set data.source.field to one of them"


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        excerpt = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(f"a document holds half a character ({excerpt!r}); remove it or repair the escape") from error


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _hash_files(files: Iterable[Path]) -> str:
    return hashlib.sha256(" ".join(file_sha256(file) for file in files).encode()).hexdigest()
