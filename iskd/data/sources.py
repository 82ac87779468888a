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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

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
from iskd.data.hub_rows import OFFLINE, commit_of, hub_rows, is_commit, kept_commit
from iskd.data.splits import Document
from iskd.system.files import hash_files

Enough = Callable[[str | None], bool]
"""Whether a split has as many tokens as were asked for; None = all those into which documents are placed by hash."""


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
        max_documents: stop after so many documents of `path`; None takes all.
    """

    path: str | None  # None, which a config says of a path that nobody gave, is refused in our own words
    val_path: str | None = None
    test_path: str | None = None
    fmt: str = "auto"
    field: str = "text"
    detokenize: str | None = None
    chat: bool = dataclass_field(default=False, repr=False)  # not in `repr`, by which shards of text are found
    max_documents: PositiveInt | None = dataclass_field(default=None, repr=False)

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
        left = self.max_documents
        for key, files in sorted(self._files().items(), key=lambda entry: entry[0] == "path"):
            for split, file in files:
                empty = True
                for text in read_file(file, self.fmt, ROWS if self.chat else self.field):
                    if key == "path" and split is None and left is not None:
                        if not left:
                            return
                        left -= 1
                    empty = False
                    yield detokenize_wikitext(text) if self.detokenize else text, split
                if empty:
                    raise ValueError(f"data.{key}: {file} holds no text; remove it or point to another file")

    def fingerprint(self) -> str:
        """Hash the bytes of every file, and how they are read where that is new."""
        found = self._files().values()
        hashes = "-".join(hash_files(file for _, file in files) for files in found)
        most = "" if self.max_documents is None else f"-{self.max_documents} documents"
        return hashes + read_as(chain(*found), self.fmt) + most

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
        revision: commit, branch or tag of the data set on the hub; a run keeps the commit that it was at its start.
        detokenize: as in `TextFiles`.
        lines: rows are the lines of a running text (as WikiText's are) and are grouped as those of a text file.
        chat: as in `TextFiles`.
        streaming: read rows as they are asked for, until there are as many tokens as the run takes, and keep no text
            on the disk; for data sets that are larger than it.
        files: glob of the files in the data set that hold `split`, as `train/*.jsonl.zst`: for one whose rows come by a
            script of its own, which nobody runs. None = the data set says.
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
    streaming: bool = dataclass_field(default=False, repr=False)  # shards are known by how much was asked for instead
    files: str | None = dataclass_field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check that there is a name, and the option that has a fixed set of values."""
        if not self.name:
            raise ValueError(f"no data set is named: set data.source.name=OWNER/NAME, or use {OFFLINE}")
        if self.revision is not None and Path(self.name).exists():
            raise ValueError(
                f"data.source.revision={self.revision} names a commit of the hub, and {self.name} is a local folder, "
                "which has none: set it to null"
            )
        if self.files is not None and (self.val_split or self.test_split or self.config):
            raise ValueError(
                "data.source.files are those of data.source.split, whatever the data set says: leave config, val_split "
                "and test_split out"
            )
        _check_detokenize(self.detokenize, self.chat)

    def documents(self, enough: Enough | None = None) -> Iterator[Document]:
        """Yield rows that are not blank; validation and test rows first.

        Args:
            enough: asked before every row, so that reading stops where nobody needs more of its split; None = never.

        Raises:
            ValueError: `datasets` is missing, the data set cannot be reached, or a row has no such field.
        """
        for name, split in ((self.val_split, "validation"), (self.test_split, "test"), (self.split, None)):
            if name is None or (enough is not None and enough(split)):
                continue
            for text in self._texts(name, self.max_documents if split is None else None):
                yield detokenize_wikitext(text) if self.detokenize else text, split
                if enough is not None and enough(split):
                    break

    def fingerprint(self) -> str:
        """Name the data set, with a hash of the files where it is a local folder."""
        folder = Path(self.name)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
        named = "" if self.files is None else f"/{self.files}"
        return f"{self!r}{named}-{hash_files(files)}"

    @property
    def moves(self) -> bool:
        """Whether the hub may have other rows under this name tomorrow."""
        return not is_commit(self.revision) and not Path(self.name).exists()

    def _texts(self, split: str, limit: int | None) -> Iterator[str]:
        streaming = self.streaming or limit is not None
        found = hub_rows(
            self.name, self.config, split,
            revision=self.revision, limit=limit, streaming=streaming, files=self.files,
        )  # fmt: skip
        rows = (
            text_of(row, ROWS if self.chat else self.field, f"data.source.name={self.name}, row {number} of {split}")
            for number, row in enumerate(found, start=1)
        )
        if self.lines and not self.chat:
            return group_lines(row.rstrip("\n") + "\n" for row in rows)
        return (row for row in rows if row.strip())


def as_chats(source: Source, loss: str) -> Source:
    """The source with its rows read as chats, for `data.chat.loss`. Raises ValueError where it has no rows."""
    if isinstance(source, TextFiles | HubDataset):
        return replace(source, chat=True)
    if not getattr(source, "chat", False):
        raise ValueError(
            f"data.chat.loss={loss} wants rows of chats, and {type(source).__name__} has texts: set data=text "
            "data.path=FILE.jsonl, or data=hf data.source.name=OWNER/NAME; in Python pass texts=[{'messages': ...}]"
        )
    return source


def pinned(source: Source, shards: Path) -> Source:
    """The source at the commit where its data set is on the hub now.

    Args:
        source: a data set of the hub, or another source, which stays as it is.
        shards: the folder of all shards: where the hub cannot be asked, the commit is that of the newest tokens there.
    """
    if not isinstance(source, HubDataset) or not source.moves:
        return source
    before, _, behind = repr(replace(source, revision="@")).partition("'@'")
    found = commit_of(source.name, source.revision) or kept_commit(before, behind, shards)
    return replace(source, revision=found or source.revision)


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
