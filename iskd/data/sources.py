"""Sources of documents: local files, data sets of the hub, the interpreter's docstrings (and `iskd.data.given`).

A source is a frozen dataclass with `documents()`, which yields (text, split) pairs, and `fingerprint()`, which changes
when its content does. A document with split None is placed by `iskd.data.splits.Splitter`.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from pydantic import PositiveInt

from iskd.data.files import (
    KINDS,
    Placed,
    detokenize_wikitext,
    group_lines,
    placed_files,
    read_as,
    read_file,
    text_of,
)
from iskd.data.files.chat import ROWS
from iskd.data.splits import Document
from iskd.system.faults import UnavailableError
from iskd.system.files import hash_files

_OFFLINE = "data=text data.path=FILE (local .txt, .jsonl or .parquet) or data=docstrings (needs no file)"


class Source(Protocol):
    """Anything that yields documents."""

    def documents(self) -> Iterator[Document]:
        """Yield (text, split or None); documents that carry a split come before those that do not."""

    def fingerprint(self) -> str:
        """Return a string that changes whenever the documents change; cheap compared with reading them."""


@dataclass(frozen=True)
class Docstrings:
    """Docstrings of the running interpreter's standard library and the topics of `help()`: about 2 MB of English.

    Args:
        min_chars: docstrings of at most this many characters are skipped.
        max_documents: stop after so many documents; None takes all.
    """

    min_chars: int = 80
    max_documents: PositiveInt | None = None

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
        return f"{sys.implementation.name}-{sys.version_info[:3]}-{hash_files(self._files())}"

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
    """Local files: plain text, JSON, csv, tsv, parquet, arrow, folders by `save_to_disk`; those of text also packed.

    Plain text becomes documents at blank lines, in groups of at least about 1,000 characters: small enough for the
    hash splits to be fine-grained, large enough to hold context.

    Args:
        path: a file, a folder or a glob.
        val_path: the same for validation; without it validation is the split of that name in `path`, or a share of it.
        test_path: the same for the test split.
        fmt: `auto` (by suffix and content; what is not known is text), or one of `iskd.data.files.kinds.KINDS`.
        field: where a row keeps its text.
        detokenize: `wikitext` undoes the word-level spacing of WikiText; None keeps the text as it is.
        chat: rows are conversations (`iskd.data.files.chat`); `field` is not read.
    """

    path: str | None  # None, which a config says of a path that nobody gave, is refused in our own words
    val_path: str | None = None
    test_path: str | None = None
    fmt: str = "auto"
    field: str = "text"
    detokenize: str | None = None
    chat: bool = dataclass_field(default=False, repr=False)  # not in `repr`, by which shards of text are found

    def __post_init__(self) -> None:
        """Check that there is a path, and the options that have a fixed set of values."""
        if not self.path:
            raise ValueError("no text file is given: set data.path=FILE (a file, a folder or a glob)")
        if self.fmt not in ("auto", *KINDS):
            raise ValueError(f"data.source.fmt={self.fmt!r} is unknown; use auto, {', '.join(KINDS)}")
        _check_detokenize(self.detokenize, self.chat)

    def documents(self) -> Iterator[Document]:
        """Yield the documents of `val_path`, `test_path` and `path`, in that order.

        Raises:
            ValueError: a path is missing, empty, not text, or lacks the field.
        """
        for key, files in sorted(self._files().items(), key=lambda entry: entry[0] == "path"):
            for split, file in files:
                empty = True
                for text in read_file(file, self.fmt, ROWS if self.chat else self.field):
                    empty = False
                    yield detokenize_wikitext(text) if self.detokenize else text, split
                if empty:
                    raise ValueError(f"data.{key}: {file} holds no text; remove it or point to another file")

    def fingerprint(self) -> str:
        """Hash the bytes of every file, and how they are read where that is new."""
        found = self._files().values()
        return "-".join(hash_files(file for _, file in files) for files in found) + read_as(chain(*found), self.fmt)

    def _files(self) -> dict[str, list[Placed]]:
        assert self.path is not None
        return placed_files(self.path, self.val_path, self.test_path)


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub (or a local folder in the same layout), read by the `datasets` library.

    Args:
        name: hub name, as `Salesforce/wikitext`.
        config: name of the configuration, where the data set has several.
        split: the split that is divided by hash.
        val_split: the split used whole for validation; None takes a share of `split`.
        test_split: the split used whole as test.
        field: the column that holds the text.
        max_documents: stream and stop after this many rows of `split`; None reads all of it through the local cache.
        revision: commit of the data set on the hub; the cache of tokens knows the content only by this name, so pin
            it where an exact rerun matters.
        detokenize: as in `TextFiles`.
        lines: rows are the lines of a running text (as WikiText's are) and are grouped as those of a text file.
        chat: as in `TextFiles`.
    """

    name: str
    config: str | None = None
    split: str = "train"
    val_split: str | None = None
    test_split: str | None = None
    field: str = "text"
    max_documents: PositiveInt | None = None
    revision: str | None = None
    detokenize: str | None = None
    lines: bool = False
    chat: bool = dataclass_field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Check that there is a name, and the option that has a fixed set of values."""
        if not self.name:
            raise ValueError(f"no data set is named: set data.source.name=OWNER/NAME, or use {_OFFLINE}")
        _check_detokenize(self.detokenize, self.chat)

    def documents(self) -> Iterator[Document]:
        """Yield rows that are not blank; validation and test rows first.

        Raises:
            ValueError: `datasets` is missing, the data set cannot be reached, or a row has no such field.
        """
        for name, split in ((self.val_split, "validation"), (self.test_split, "test"), (self.split, None)):
            if name is None:
                continue
            for text in self._texts(name, self.max_documents if split is None else None):
                yield detokenize_wikitext(text) if self.detokenize else text, split

    def fingerprint(self) -> str:
        """Name the data set, with a hash of the files where it is a local folder."""
        folder = Path(self.name)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
        return f"{self!r}-{hash_files(files)}"

    def _texts(self, split: str, limit: int | None) -> Iterator[str]:
        rows = (
            text_of(row, ROWS if self.chat else self.field, f"data.source.name={self.name}, row {number} of {split}")
            for number, row in enumerate(self._rows(split, limit), start=1)
        )
        if self.lines and not self.chat:
            return group_lines(row.rstrip("\n") + "\n" for row in rows)
        return (row for row in rows if row.strip())

    def _rows(self, split: str, limit: int | None) -> Iterator[Any]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            fix = f"pip install datasets, or use {_OFFLINE}"
            raise ValueError(f"data.source={self.name} needs the package datasets; {fix}") from error
        if any(Path(self.name, name).is_file() for name in ("dataset_dict.json", "state.json")):
            raise ValueError(f"{self.name} was written by save_to_disk: set data=text data.path={self.name}")
        try:
            # Streaming spares the download of the rest; reading whole goes through the cache, which works offline.
            # Where nothing is said, datasets before version 4 asks on the terminal whether to run a data set's script.
            rows = load_dataset(
                self.name,
                self.config,
                split=split,
                revision=self.revision,
                streaming=limit is not None,
                trust_remote_code=False,
            )
            iterator = iter(rows if limit is None else rows.take(limit))
            first = next(iterator, None)
        except Exception as error:
            what = f"data set {self.name!r} (config {self.config!r}, split {split!r}) could not be loaded: {error}"
            raise UnavailableError(f"{what}. Without a network use {_OFFLINE}") from error
        if first is not None:
            yield first
        yield from iterator


def _check_detokenize(detokenize: str | None, chat: bool) -> None:
    if detokenize not in (None, "wikitext"):
        raise ValueError(f"data.source.detokenize={detokenize!r} is unknown; use wikitext or null")
    if detokenize and chat:
        raise ValueError("data.source.detokenize is for running text, not for chats: set it to null")


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
