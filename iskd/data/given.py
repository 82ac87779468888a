"""Documents that the caller has in memory, texts or chats, instead of files; known by the hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from iskd.data.files.chat import conversation, is_chat
from iskd.data.splits import Document


@dataclass(frozen=True)
class GivenTexts:
    """Documents held in memory; an `iskd.data.sources.Source`.

    Attributes:
        texts: one document each, none of them blank.
        chat: the documents are conversations (`iskd.data.files.chat`).
        sha256: of all documents in their order; the only thing that is written down about them.
    """

    texts: tuple[str, ...] = dataclass_field(repr=False)
    chat: bool = dataclass_field(default=False, repr=False)
    sha256: str = dataclass_field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode("utf-8", "surrogatepass")  # half a character is refused when it is read, with its place
            digest.update(len(data).to_bytes(8, "little") + data)
        object.__setattr__(self, "sha256", digest.hexdigest())

    def documents(self) -> Iterator[Document]:
        """Yield the documents in their order, none with a split of its own."""
        return ((text, None) for text in self.texts)

    def fingerprint(self) -> str:
        """Return the hash of the documents."""
        return self.sha256


def given_texts(texts: Iterable[str | Mapping[str, Any]]) -> GivenTexts:
    """Read all documents of an iterable as those of files: texts stripped, without blank ones, or rows of chats.

    Raises:
        ValueError: an item is neither, both are there, or nothing is left.
    """
    kept: list[str] = []
    chats = 0
    for number, text in enumerate(texts):
        if isinstance(text, Mapping) and is_chat(text):
            kept.append(conversation(dict(text), f"texts[{number}]"))
            chats += 1
        elif not isinstance(text, str):
            raise ValueError(
                f"texts[{number}] is {type(text).__name__}, not a string and no chat (`messages`, or `prompt` and "
                "`completion`); for rows of a data set pass texts=[row['text'] for row in rows]"
            )
        elif text.strip():
            kept.append(text.strip())
        if 0 < chats < len(kept):
            raise ValueError(f"texts mixes texts and chats, up to texts[{number}]: pass all of one kind")
    if not kept:
        raise ValueError("texts holds no document that is not blank; pass strings, a file or the name of a data config")
    return GivenTexts(tuple(kept), bool(chats))
