"""Token shards on disk: the documents of each split as one memory-mapped stream, built once and checked on open.

The tokens of a split's documents are joined by the tokenizer's end-of-text token, never padded, and stored as one flat
stream; windows of any length are views of it, so that a change of `seq_len` costs nothing. A folder of shards is named
by the hash of everything that decides its content: tokenizer, source, files, shares, format version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iskd.data.sources import Source
from iskd.data.splits import SPLITS, Splitter
from iskd.system import file_sha256, read_json, write_whole
from iskd.system.files import MAX_NUMBER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = NDArray[np.integer[Any]]

_VERSION = 1
_DTYPES = ("<u2", "<u4")  # never what a file says beyond these: numpy's "O" would be pointers
_BATCH_DOCUMENTS = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shards:
    """An open folder of shards.

    Args:
        folder: where the shards and `meta.json` lie.
        meta: what `meta.json` says: source, tokenizer, separator, dtype, max_id, and per split file, tokens, documents.
    """

    folder: Path
    meta: dict[str, Any]

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return int(self.meta["splits"][split]["tokens"])

    def stream(self, split: str) -> Tokens:
        """Return the whole token stream of a split, memory-mapped, [tokens]."""
        if self.tokens(split) == 0:
            return np.empty(0, dtype=self.meta["dtype"])
        return np.memmap(self.folder / self.meta["splits"][split]["file"], dtype=self.meta["dtype"], mode="r")

    def windows(self, split: str, seq_len: int) -> Tokens:
        """Return the stream cut into windows, remainder dropped: a view, [windows, seq_len].

        Raises:
            ValueError: the split has no document, or fewer tokens than one window.
        """
        tokens, documents = self.tokens(split), int(self.meta["splits"][split]["documents"])
        if documents == 0:
            total = sum(int(entry["documents"]) for entry in self.meta["splits"].values())
            if self.meta["dropped"]:  # texts are compared by hash: what reports read, nothing is chosen or trained by
                raise ValueError(
                    f"split {split!r} got none of the {total} documents of {self.meta['source']}: "
                    f"{self.meta['dropped']} were dropped because the "
                    "same texts are in data.val_path or data.test_path; give other files"
                )
            raise ValueError(
                f"split {split!r} got 0 of the {total} documents of {self.meta['source']}; use more text, "
                + ("lower the held-out shares" if split == "train" else f"raise data.{split}_fraction")
                + ", or give files of your own (data.path and data.val_path)"
            )
        if tokens < seq_len:
            raise ValueError(
                f"split {split!r} of {self.meta['source']} has {tokens} tokens, less than one window of "
                f"data.seq_len={seq_len}; lower data.seq_len to at most {tokens}, or use more text (data.path)"
            )
        count = tokens // seq_len
        # [tokens] -> [windows, seq_len] without a copy: windows are read from the file when a batch asks for them
        return self.stream(split)[: count * seq_len].reshape(count, seq_len)


def open_shards(source: Source, tokenizer: PreTrainedTokenizerBase, splitter: Splitter, cache_dir: Path) -> Shards:
    """Open the shards of a source, building them first when they do not exist.

    Several processes may call this at once: each builds in a folder of its own and moves whole files into place.

    Raises:
        ValueError: the source cannot be read, or a shard on disk is not what was written.
    """
    # all that decides a token; what is not in here must not change one, or a run would read another's shards
    recipe = {
        "version": _VERSION,
        "tokenizer": tokenizer_hash(tokenizer),
        "source": repr(source),
        "content": source.fingerprint(),
        "shares": [splitter.validation, splitter.calibration, splitter.test],
    }
    folder = cache_dir / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    if not (folder / "meta.json").is_file():  # written last: with it the folder is whole
        _log.info("tokenizing %r into %s", source, folder)
        _build(recipe, source, tokenizer, splitter, folder)
    shards = Shards(folder, _read_meta(folder, recipe))
    _check(shards)
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


def separator(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int | None]:
    """Return the name and id of the token between documents: eos, else bos, else ("none", None)."""
    for name, token in (("eos", tokenizer.eos_token_id), ("bos", tokenizer.bos_token_id)):
        if isinstance(token, int):
            return name, token
    return "none", None


class _Writer:
    """Appends documents to one shard."""

    def __init__(self, path: Path, dtype: str, between: int | None) -> None:
        self.path, self.dtype = path, dtype
        self.between = [] if between is None else [between]
        self.tokens = self.documents = 0
        self.max_id = -1

    def add(self, handle: IO[bytes], ids: list[int]) -> None:
        # the separator stands between documents alone, so that no stream starts or ends with one
        ids = self.between + ids if self.documents else ids
        handle.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.tokens += len(ids)
        self.documents += 1
        self.max_id = max(self.max_id, *ids)

    def entry(self) -> dict[str, Any]:
        sha256 = file_sha256(self.path)
        return {"file": self.path.name, "tokens": self.tokens, "documents": self.documents, "sha256": sha256}


def _build(
    recipe: dict[str, Any], source: Source, tokenizer: PreTrainedTokenizerBase, splitter: Splitter, folder: Path
) -> None:
    name, between = separator(tokenizer)
    if name != "eos":
        _log.warning("the tokenizer has no EOS token; documents are separated by: %s", name)
    # two bytes a token where every id fits; the byte order is written down, for the file may go to another machine
    dtype = "<u2" if max(tokenizer.get_vocab().values(), default=0) < 2**16 else "<u4"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside the goal, so on its file system: only there is `os.replace` one step
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        writers = {split: _Writer(Path(temporary, f"{split}.bin"), dtype, between) for split in SPLITS}
        handles = {split: writer.path.open("wb") for split, writer in writers.items()}
        try:
            # one pass over the source; documents go to their splits by hash, whatever their order
            for batch in _batches(splitter.assign(source.documents())):
                for (_, split), ids in zip(batch, _encode([text for text, _ in batch], tokenizer), strict=True):
                    if ids:  # an empty document would be two separators in a row
                        writers[split].add(handles[split], ids)
        finally:
            for handle in handles.values():
                handle.close()
        meta = recipe | {
            "separator": name,
            "separator_id": between,
            "dtype": dtype,
            "max_id": max(writer.max_id for writer in writers.values()),
            "dropped": splitter.dropped,
            "splits": {split: writer.entry() for split, writer in writers.items()},
        }
        write_whole(Path(temporary, "meta.json"), json.dumps(meta, indent=2))
        folder.mkdir(exist_ok=True)
        for file in [*(writer.path.name for writer in writers.values()), "meta.json"]:  # meta last: it marks the end
            os.replace(Path(temporary, file), folder / file)


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, _BATCH_DOCUMENTS)):
        yield batch


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: a document longer than the model's context is fine here, it is cut into windows.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _read_meta(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What `meta.json` says, its types checked, so that nothing outside of `folder` is named by it.

    Raises:
        ValueError: it is damaged, or was made by another recipe than the one that the folder is named after.
    """
    try:
        meta = read_json(folder / "meta.json")
        # the folder's name is a hash of the recipe: another recipe inside is damage or a file put there
        other = [key for key, value in recipe.items() if meta[key] != value]
        if other:
            raise ValueError(f"its {other[0]} is that of other shards")
        if meta["dtype"] not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {meta['dtype']!r:.80}")
        counts = {"max_id": _count(meta, "max_id", low=-1), "dropped": _count(meta, "dropped")}
        splits = {split: _split_entry(meta["splits"][split], split) for split in SPLITS}
        known = {key: meta[key] for key in (*recipe, "separator", "separator_id", "dtype")}
        if not isinstance(known["separator"], str):
            raise ValueError(f"separator must be text, got {known['separator']!r:.80}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'} is damaged ({error}); delete the folder {folder}") from error
    return {**known, **counts, "splits": splits}


def _split_entry(entry: Any, split: str) -> dict[str, Any]:
    if entry["file"] != f"{split}.bin":
        raise ValueError(f"the file of split {split} must be {split}.bin, got {entry['file']!r:.80}")
    if not isinstance(entry["sha256"], str):
        raise ValueError(f"sha256 of split {split} must be text, got {entry['sha256']!r:.80}")
    counts = {key: _count(entry, key) for key in ("tokens", "documents")}
    return {"file": f"{split}.bin", "sha256": entry["sha256"], **counts}


def _count(values: Any, key: str, low: int = 0) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_NUMBER:
        raise ValueError(f"{key} must be an integer from {low} to {MAX_NUMBER}, got {value!r:.80}")
    return value


def _check(shards: Shards) -> None:
    dtype, largest = np.dtype(shards.meta["dtype"]), shards.meta["max_id"]
    fix = f"delete the folder {shards.folder} and run again"
    # cheap tests first: size before hash, and one look at the tokens only where the bytes are those that were written
    for entry in shards.meta["splits"].values():
        path, expected = shards.folder / entry["file"], entry["tokens"] * dtype.itemsize
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"shard {path} is missing or no plain file; {fix}")
        stat = path.stat()
        if stat.st_size != expected:
            raise ValueError(f"shard {path} has {stat.st_size} bytes, not {expected}; {fix}")
        if _sha256_once(path, stat.st_size, stat.st_mtime_ns) != entry["sha256"]:
            raise ValueError(f"shard {path} does not have the SHA-256 that was written; {fix}")
        if expected and (found := _max_once(path, dtype, stat.st_size, stat.st_mtime_ns)) > largest:
            raise ValueError(f"shard {path} holds the token {found}, above the max_id={largest} of meta.json; {fix}")


@cache
def _sha256_once(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once per process; the size and the time of change make the answer stale when it is rewritten."""
    return file_sha256(path)


@cache
def _max_once(path: Path, dtype: np.dtype[Any], size: int, mtime_ns: int) -> int:
    """Largest token of a file, once per process: one beyond the model's vocabulary would stop the run in its midst."""
    return int(np.memmap(path, dtype=dtype, mode="r").max())
