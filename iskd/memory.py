"""What a run takes from memory instead of from disk or a hub: a model with its tokenizer, and documents.

Both are known by the hash of their content, as files are, so that shards are found again and a resumed run notices when
it is given something else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.splits import Document
from iskd.teachers import Loaded


@dataclass(frozen=True)
class MemoryTexts:
    """Documents held in memory; an `iskd.corpus.Source`.

    Attributes:
        texts: one document each, none of them blank.
        sha256: of all documents in their order; the only thing that is written down about them.
    """

    texts: tuple[str, ...] = field(repr=False)
    sha256: str = field(init=False)

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


def memory_texts(texts: Iterable[str]) -> MemoryTexts:
    """Read all documents of an iterable as those of files are read: stripped, without blank ones.

    Raises:
        ValueError: an item is no string, or nothing is left.
    """
    kept: list[str] = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"texts[{number}] is {type(text).__name__}, not a string; for rows of a data set pass "
                "texts=[row['text'] for row in rows]"
            )
        if text.strip():
            kept.append(text.strip())
    if not kept:
        raise ValueError("texts holds no document that is not blank; pass strings, a file or the name of a data config")
    return MemoryTexts(tuple(kept))


def memory_teacher(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """Take a model in memory as the teacher, as it is.

    Raises:
        ValueError: the tokenizer has ids that the embedding has no row for.
    """
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the embedding of {type(model).__name__} only {rows} rows: pass "
            "the tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) first"
        )
    source: dict[str, str | int] = {
        "name": model.config.name_or_path or type(model).__name__,
        "kind": "memory",
        "sha256": _digest(model),
        "tokenizer": "given",
        "dtype": str(model.dtype).removeprefix("torch."),
        "padding_rows": rows - 1 - largest,
    }
    return Loaded(model, tokenizer, source)


@contextmanager
def lent(model: PreTrainedModel) -> Iterator[None]:
    """A model that belongs to somebody else: its modes, gradient flags and device are afterwards what they were.

    Meanwhile all of its parameters ask for gradients, as those of a model that was loaded for the run do: the student
    starts as its copy.
    """
    device = model.device
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        nn.Module.to(model, device)


def _digest(model: PreTrainedModel) -> str:
    """SHA-256 of names and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
