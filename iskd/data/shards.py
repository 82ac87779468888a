"""Token shards on disk: the documents of each split as one memory-mapped stream, built once and checked on open.

The tokens of a split's documents are framed and joined (`iskd.data.framing`), never padded, and stored as one flat
stream; windows of any length are views of it, so that a change of `seq_len` costs nothing unless every window has a
head of its own (`data.bos=window`). Of chats whose answers alone are learned, a stream of the same length says which
tokens these are. A folder of shards is named by the hash of everything that decides its content: tokenizer, framing,
source, files, shares, format version. Shards of iskd 0.1 have the framing of `data.bos=none`: they are found where that
is meant, and never where it is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iskd.data.building import Asked, build
from iskd.data.coding import Coding
from iskd.data.framing import Framing, separator
from iskd.data.sources import Source
from iskd.data.splits import SPLITS, Splitter
from iskd.data.writer import ShardMeta
from iskd.system import Json, file_sha256, read_json
from iskd.system.files import sweep
from iskd.system.reading import read_as

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = NDArray[np.integer[Any]]

_VERSION = 1
_NAMES = re.compile("[0-9a-f]{16}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shards:
    """An open folder of shards.

    Args:
        folder: where the shards and `meta.json` lie.
        recipe: all that decides a token: tokenizer, source, content, shares, framing.
        meta: the rest of `meta.json`.
    """

    folder: Path
    recipe: Json
    meta: ShardMeta

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return self.meta.splits[split].tokens

    def stream(self, split: str) -> Tokens:
        """Return the whole token stream of a split, memory-mapped, [tokens]."""
        if self.tokens(split) == 0:
            return np.empty(0, dtype=self.meta.dtype)
        return np.memmap(self.folder / self.meta.splits[split].file, dtype=self.meta.dtype, mode="r")

    def targets(self, split: str, seq_len: int) -> Tokens | None:
        """Return which tokens of the windows are to be learned, 0 or 1, [windows, seq_len]; None = all of them."""
        if self.meta.splits[split].targets is None:
            return None
        count = self.tokens(split) // seq_len
        if count == 0:
            return np.empty((0, seq_len), dtype=np.uint8)
        marks: Tokens = np.memmap(self.folder / f"{split}.targets.bin", dtype=np.uint8, mode="r")
        return marks[: count * seq_len].reshape(count, seq_len)

    def sections(self, split: str, seq_len: int) -> dict[str, tuple[int, int]]:
        """Return the first window of each source of a mix and the one behind its last, by name; "" = the only source.

        A window in which one source ends and the next one begins is of neither.
        """
        found: dict[str, tuple[int, int]] = {}
        sections = self.meta.splits[split].sections
        start = 0
        for name, tokens in ({"": self.tokens(split)} if sections is None else sections).items():
            first, end = -(-start // seq_len), (start + tokens) // seq_len
            found[name] = (first, max(first, end))
            start += tokens
        return found

    def windows(self, split: str, seq_len: int) -> Tokens:
        """Return the stream cut into windows, remainder dropped: a view, [windows, seq_len].

        Raises:
            ValueError: the split has no document, or fewer tokens than one window.
        """
        tokens, documents = self.tokens(split), self.meta.splits[split].documents
        if documents == 0:
            total = sum(entry.documents for entry in self.meta.splits.values())
            if self.meta.dropped:  # texts are compared by hash: what reports read, nothing is chosen or trained by
                raise ValueError(
                    f"split {split!r} got none of the {total} documents of {self.recipe['source']}: "
                    f"{self.meta.dropped} were dropped because the "
                    "same texts are in data.val_path or data.test_path; give other files"
                )
            raise ValueError(
                f"split {split!r} got 0 of the {total} documents of {self.recipe['source']}; use more text, "
                + ("lower the held-out shares" if split == "train" else f"raise data.{split}_fraction")
                + ", or give files of your own (data.path and data.val_path)"
            )
        if tokens < seq_len:
            raise ValueError(
                f"split {split!r} of {self.recipe['source']} has {tokens} tokens, less than one window of "
                f"data.seq_len={seq_len}; lower data.seq_len to at most {tokens}, or use more text (data.path)"
            )
        count = tokens // seq_len
        # [tokens] -> [windows, seq_len] without a copy: windows are read from the file when a batch asks for them
        return self.stream(split)[: count * seq_len].reshape(count, seq_len)


def open_shards(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    splitter: Splitter,
    cache_dir: Path,
    coding: Coding | None = None,
    asked: Asked | None = None,
) -> Shards:
    """Open the shards of a source, building them first when they do not exist.

    Several processes may call this at once: each builds in a folder of its own and moves whole files into place.

    Args:
        source: where documents come from.
        tokenizer: what makes tokens of them.
        splitter: which split a document goes to.
        cache_dir: parent of all folders of shards.
        coding: how a document becomes tokens; None = text with the separator between documents.
        asked: how many tokens are read of sources that stream; None = all.

    Raises:
        ValueError: the source cannot be read, or a shard on disk is not what was written.
    """
    if coding is None:
        _, between = separator(tokenizer)
        coding = Coding(Framing(between=() if between is None else (between,)))
    # all that decides a token; what is not in here must not change one, or a run would read another's shards
    recipe = {
        "version": _VERSION,
        "tokenizer": tokenizer_hash(tokenizer),
        "source": repr(source),
        "content": source.fingerprint(),
        "shares": [splitter.validation, splitter.calibration, splitter.test],
        **coding.recipe(),
        **({} if asked is None else asked.to_json()),
    }
    folder = cache_dir / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    sweep(cache_dir)
    if not (folder / "meta.json").is_file():  # written last: with it the folder is whole
        _log.info("tokenizing %r into %s", source, folder)
        build(recipe, source, tokenizer, splitter, folder, coding, asked or Asked())
    shards = Shards(folder, recipe, _read_meta(folder, recipe))
    _check(shards)
    return shards


def kept_shards(cache_dir: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> Shards | None:
    """The shards that an earlier run names, of the same tokenizer; None where they are not here, or not whole any more.

    Args:
        cache_dir: parent of all folders of shards.
        name: of the folder.
        tokenizer: of the run that asks.
    """
    folder = cache_dir / name
    if not _NAMES.fullmatch(name) or not (folder / "meta.json").is_file():
        return None
    try:
        recipe = {"tokenizer": tokenizer_hash(tokenizer)}
        shards = Shards(folder, recipe, _read_meta(folder, recipe))
        _check(shards)
    except ValueError as error:
        _log.warning("the text of an earlier run cannot be read: %s", error)
        return None
    return shards


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what decides a tokenizer's output: the fast backend's JSON, else its vocabulary."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # A call with padding or truncation leaves its settings behind in the backend.
        state.update(padding=None, truncation=None)
    else:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps([state, separator(tokenizer)], sort_keys=True).encode()).hexdigest()


def _read_meta(folder: Path, recipe: Json) -> ShardMeta:
    """What `meta.json` says, so that nothing outside of `folder` is named by it.

    Raises:
        ValueError: it is damaged, or was made by another recipe than the one that the folder is named after.
    """
    try:
        told = read_json(folder / "meta.json")
        # the folder's name is a hash of the recipe: another recipe inside is damage or a file put there
        if other := [key for key, value in recipe.items() if told[key] != value]:
            raise ValueError(f"its {other[0]} is that of other shards")
        splits = {split: told["splits"][split] for split in SPLITS}
        meta = read_as(ShardMeta, {**told, "splits": splits}, "meta.json", others=True)
        for split, entry in meta.splits.items():
            if entry.file != f"{split}.bin":
                raise ValueError(f"the file of split {split} must be {split}.bin, got {entry.file!r:.80}")
            if entry.sections is not None and sum(entry.sections.values()) != entry.tokens:
                raise ValueError(f"the sections of split {split} have not its {entry.tokens} tokens")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'} is damaged ({error}); delete the folder {folder}") from error
    return meta


def _check(shards: Shards) -> None:
    dtype, largest = np.dtype(shards.meta.dtype), shards.meta.max_id
    fix = f"delete the folder {shards.folder} and run again"
    # cheap tests first: size before hash, and one look at the tokens only where the bytes are those that were written
    for split, entry in shards.meta.splits.items():
        path, expected = shards.folder / entry.file, entry.tokens * dtype.itemsize
        stat = _check_file(path, expected, entry.sha256, fix)
        if expected and (found := _max_once(path, dtype, stat.st_size, stat.st_mtime_ns)) > largest:
            raise ValueError(f"shard {path} holds the token {found}, above the max_id={largest} of meta.json; {fix}")
        if entry.targets is not None:
            _check_file(shards.folder / f"{split}.targets.bin", entry.tokens, entry.targets, fix)


def _check_file(path: Path, size: int, sha256: str, fix: str) -> os.stat_result:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"shard {path} is missing or no plain file; {fix}")
    stat = path.stat()
    if stat.st_size != size:
        raise ValueError(f"shard {path} has {stat.st_size} bytes, not {size}; {fix}")
    if _sha256_once(path, stat.st_size, stat.st_mtime_ns) != sha256:
        raise ValueError(f"shard {path} does not have the SHA-256 that was written; {fix}")
    return stat


@cache
def _sha256_once(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once per process; the size and the time of change make the answer stale when it is rewritten."""
    return file_sha256(path)


@cache
def _max_once(path: Path, dtype: np.dtype[Any], size: int, mtime_ns: int) -> int:
    """Largest token of a file, once per process: one beyond the model's vocabulary would stop the run in its midst."""
    return int(np.memmap(path, dtype=dtype, mode="r").max())
