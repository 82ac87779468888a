"""One split's documents on their way to the disk: framed, joined, and where some tokens are no targets, marked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np

from iskd.data.coding import Coded, Coding
from iskd.system import Json, file_sha256
from iskd.system.reading import Count, between, must_be


@dataclass(frozen=True)
class ShardFile:
    """What `meta.json` says of a split.

    Attributes:
        file: the name of its shard.
        tokens, documents: how many it holds.
        sha256: of the shard.
        targets: of the marks that say which tokens are targets; None where every token is one.
        sections: tokens of each source of a mix, by name, in the order of the stream; None where there is one source.
    """

    file: str
    tokens: Count
    documents: Count
    sha256: str
    targets: Annotated[str | None, must_be("a string", lambda value: isinstance(value, str))] = None
    sections: dict[str, Count] | None = None

    def to_json(self) -> Json:
        """Plain JSON values; no key without marks, or of one source."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ShardMeta:
    """What `meta.json` says beside the recipe.

    Attributes:
        separator, separator_id: what stands between documents, `eos`, `bos` or `none`, and its token's id or None.
        dtype: of the tokens; never another, as numpy's "O" would be pointers.
        max_id: the largest token, -1 without any.
        dropped: documents left out of training, as they are held out too.
        splits: the shard of each split.
    """

    separator: str
    separator_id: Any
    dtype: Literal["<u2", "<u4"]
    max_id: Annotated[int, between(-1)]
    dropped: Count
    splits: dict[str, ShardFile]

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self) | {"splits": {split: entry.to_json() for split, entry in self.splits.items()}}


class Writer:
    """Appends documents to one shard, and to that of its targets where some tokens are none.

    Args:
        folder: where the shard goes.
        split: its name.
        dtype: of its tokens.
        coding: what frames documents.

    Attributes:
        path, marks: the files, the second None where every token is a target.
        tokens, documents: how many are written.
        max_id: the largest token.
        sections: tokens by source of a mix.
    """

    def __init__(self, folder: Path, split: str, dtype: str, coding: Coding) -> None:
        self.path, self.marks, self.dtype, self._coding = folder / f"{split}.bin", None, dtype, coding
        if coding.marks_targets:
            self.marks = folder / f"{split}.targets.bin"
        self.tokens = self.documents = 0
        self.max_id = -1
        self.sections: dict[str, int] = {}
        self._section = ""
        self._streams: list[IO[bytes]] = []

    def __enter__(self) -> Writer:
        """Open the files."""
        self._streams = [path.open("wb") for path in (self.path, self.marks) if path is not None]
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        for stream in self._streams:
            stream.close()

    def begin(self, section: str) -> None:
        """What is added from now on is of this source; "" = of the only one."""
        self._section = section

    @property
    def in_section(self) -> int:
        """Tokens of the source that is written."""
        return self.sections.get(self._section, 0)

    def add(self, document: Coded) -> None:
        """Append a document's own tokens and their marks."""
        ids, targets = document
        frame, seq_len = self._coding.framing, self._coding.seq_len
        # a separator stands between documents alone, so that no stream starts or ends with one
        framed, at = frame.framed(ids, first=not self.documents)
        written = frame.headed(framed, seq_len, self.tokens)
        self._streams[0].write(np.asarray(written, dtype=self.dtype).tobytes())
        if self.marks is not None:
            own = [1] * len(ids) if targets is None else [int(target) for target in targets]
            known = [0] * at + own + [0] * (len(framed) - at - len(ids))
            marks = frame.headed(known, seq_len, self.tokens, filler=0)
            self._streams[1].write(np.asarray(marks, dtype=np.uint8).tobytes())
        self.tokens += len(written)
        self.sections[self._section] = self.sections.get(self._section, 0) + len(written)
        self.documents += 1
        self.max_id = max(self.max_id, *written)

    def entry(self) -> ShardFile:
        """What was written."""
        marks = None if self.marks is None else file_sha256(self.marks)
        sections = None if set(self.sections) <= {""} else self.sections
        return ShardFile(self.path.name, self.tokens, self.documents, file_sha256(self.path), marks, sections)
