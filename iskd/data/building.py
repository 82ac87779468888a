"""Documents of one or several sources onto the disk: read once, placed, made into tokens, written, moved into place."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from iskd.data.coding import Coding
from iskd.data.framing import separator
from iskd.data.mix import Mix, named, parted, sources_of
from iskd.data.sources import Enough, Source
from iskd.data.splits import SPLITS, PlacedTexts, Splitter
from iskd.data.writer import ShardMeta, Writer
from iskd.system import Json, write_whole
from iskd.system.files import scratch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_DOCUMENTS = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """How much is read of sources that stream, which may have no end.

    Attributes:
        train: tokens of the training split by source, "" = of the only one.
        held_out: tokens of every other split, of each source.
    """

    train: Mapping[str, int] = field(default_factory=dict)
    held_out: int = 0

    @classmethod
    def of_sources(cls, source: Source, train: int | None, held_out: int) -> Asked | None:
        """What a run asks of sources that stream; None where none does.

        Args:
            source: one, or a mix.
            train: `data.max_train_tokens`.
            held_out: tokens of every other split.

        Raises:
            ValueError: a source streams, and nobody says how much is wanted.
        """
        shares = source.shares if isinstance(source, Mix) else {"": 1.0}
        streams = [name for name, each in sources_of(source).items() if getattr(each, "streaming", False)]
        if not streams:
            return None
        if train is None:
            raise ValueError(
                "data.source.streaming=true reads no more than is asked for, and nothing says how much that is: set "
                "data.max_train_tokens=COUNT"
            )
        return cls({name: math.ceil(shares[name] * train) for name in streams}, held_out)

    def to_json(self) -> Json:
        """Plain JSON values, as a part of a recipe."""
        return {"asked": {"train": dict(self.train), "held_out": self.held_out}}

    def of(self, section: str, writers: Mapping[str, Writer], splitter: Splitter) -> Enough:
        """Whether what is written of a source is enough."""
        provided: set[str] = set()

        def full(split: str) -> bool:
            return writers[split].in_section >= (self.train[section] if split == "train" else self.held_out)

        def enough(split: str | None) -> bool:
            if split is not None:  # the source has it itself, and after it nothing more goes there
                provided.add(split)
                return full(split)
            shares = {"train": 1.0, "validation": splitter.validation, "calibration": splitter.calibration}
            return all(full(name) for name, share in shares.items() if share and name not in provided)

        return enough


def build(
    recipe: dict[str, Any],
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    splitter: Splitter,
    folder: Path,
    coding: Coding,
    asked: Asked,
) -> None:
    """Write the shards of a source into a folder, whole or not at all.

    Raises ValueError where a document cannot be read; of a mix with the name of its source.
    """
    name, between = separator(tokenizer)
    if name != "eos" and coding.framing.between:
        _log.warning("the tokenizer has no EOS token; documents are separated by: %s", name)
    # two bytes a token where every id fits; the byte order is written down, for the file may go to another machine
    dtype: Literal["<u2", "<u4"] = "<u2" if max(tokenizer.get_vocab().values(), default=0) < 2**16 else "<u4"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside the goal, so on its file system: only there is `os.replace` one step
    with scratch(folder.name, folder.parent) as temporary:
        writers = {split: Writer(temporary, split, dtype, coding) for split in SPLITS}
        with ExitStack() as open_files:
            for writer in writers.values():
                open_files.enter_context(writer)
            opened = [_Opened(name, each, asked, writers, splitter) for name, each in sources_of(source).items()]
            placed: PlacedTexts = {}
            splitter.dropped = 0
            # what sources have placed themselves first, of all of them, so that no other trains on it
            parts = [(each, each.placed) for each in opened] + [(each, each.others) for each in opened]
            for each, documents in parts:
                for writer in writers.values():
                    writer.begin(each.name)
                try:
                    # one pass over a source; documents go to their splits by hash, whatever their order
                    for batch in _batches(splitter.assign(documents, placed, each.provided)):
                        coded = coding.encode([text for text, _ in batch], tokenizer)
                        for (_, split), document in zip(batch, coded, strict=True):
                            if document[0]:  # an empty document would be two separators in a row
                                writers[split].add(document)
                except ValueError as error:
                    raise named(error, each.name) from error
        coding.tell()
        max_id = max(writer.max_id for writer in writers.values())
        splits = {split: writer.entry() for split, writer in writers.items()}
        meta = ShardMeta(name, between, dtype, max_id, splitter.dropped, splits)
        write_whole(temporary / "meta.json", json.dumps(recipe | meta.to_json(), indent=2))
        folder.mkdir(exist_ok=True)
        files = [path.name for writer in writers.values() for path in (writer.path, writer.marks) if path is not None]
        for file in [*files, "meta.json"]:  # meta last: it marks the end
            os.replace(temporary / file, folder / file)


class _Opened:
    """A source that is being read.

    Attributes:
        name: in its mix.
        placed, others: its documents, those that it has placed itself first.
        provided: splits that it places documents in.
    """

    def __init__(
        self, name: str, source: Source, asked: Asked, writers: Mapping[str, Writer], splitter: Splitter
    ) -> None:
        self.name = name
        self.provided: set[str] = set()
        streams: Any = source if getattr(source, "streaming", False) else None
        enough = None if streams is None else asked.of(name, writers, splitter)
        self.placed, self.others = parted(source.documents() if enough is None else streams.documents(enough))


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, _BATCH_DOCUMENTS)):
        yield batch
