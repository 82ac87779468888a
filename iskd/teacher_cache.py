"""The teacher cache: what the teacher says about every training window, computed once and read by every later run.

One folder per recipe, named by its hash: kind, windows (their very tokens), seq_len, tokenizer, the teacher's weights
and config, precision. In it `meta.json` for the reader, and chunks of whole windows

    00000.rows   rows [windows of the chunk, seq_len] (`iskd.teacher_rows`), then the SHA-256 of those bytes

A chunk is written under another name and renamed when it is whole, so that a killed build goes on where it was; a chunk
is checked when a process first reads from it. One process builds at a time, others wait for it and find the result. It
pays for several epochs over fixed text or several runs over it, never for one epoch of one run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from iskd import sharding
from iskd.arch import Stack
from iskd.plan import read_json
from iskd.teacher_rows import CacheSpec, RowFormat

Windows = NDArray[np.integer[Any]]

_VERSION = 1
_SHA256 = 32  # bytes
_OPEN_CHUNKS = 64  # each holds a file descriptor
_PIECE = 1 << 16  # windows hashed at a time
_VARIABLE = ("_name_or_path", "transformers_version")  # of a config: not what the model computes
_log = logging.getLogger(__name__)


class TeacherCache:
    """Rows of the training windows, by window number.

    Attributes:
        spec: what is kept. folder: where. nbytes_per_token: size of a row.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows, folder: Path, spec: CacheSpec, tokenizer: str) -> None:
        if sharding.is_sharded(model):
            raise ValueError("teacher.cache needs a whole teacher: build it with trainer=gpu, not with trainer=fsdp")
        self.spec, self._format = spec, RowFormat(spec, Stack(model))
        self.count, self.seq_len = (int(size) for size in windows.shape)
        self._per_chunk = max(1, spec.chunk_tokens // self.seq_len)
        self.recipe = self._recipe(model, windows, tokenizer)
        self.folder = folder / hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:16]
        self._checked: set[int] = set()
        self._rows = lru_cache(maxsize=_OPEN_CHUNKS)(self._open_chunk)

    @classmethod
    def open(
        cls,
        model: PreTrainedModel,
        windows: Windows,
        folder: Path,
        spec: CacheSpec | None = None,
        *,
        tokenizer: str = "",
    ) -> TeacherCache:
        """The whole cache of these windows and this teacher; arguments as of `build`.

        Raises:
            ValueError: it is not there, not whole, or another one lies in its folder.
        """
        cache = cls(model, windows, folder, spec or CacheSpec(), tokenizer)
        missing = cache._missing()
        if missing:
            total = cache._chunk_count
            raise ValueError(f"teacher cache {cache.folder} lacks {len(missing)} of {total} chunks: build it first")
        cache._check_meta()
        return cache

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        windows: Windows,
        folder: Path,
        spec: CacheSpec | None = None,
        *,
        tokenizer: str = "",
        batch_size: int = 8,
    ) -> TeacherCache:
        """The cache of these windows and this teacher, made as far as it is not there yet.

        The teacher runs where it lies and in the caller's autocast, which has to be that of training.

        Args:
            model: the teacher, whole.
            windows: [windows, seq_len] of token ids, may be memory-mapped.
            folder: parent of all caches.
            spec: what is kept.
            tokenizer: hash of the tokenizer (`iskd.shards.tokenizer_hash`).
            batch_size: windows per forward pass.

        Raises:
            ValueError: the model is in shards, the disk is too small, or another cache lies in the folder.
        """
        cache = cls(model, windows, folder, spec or CacheSpec(), tokenizer)
        if cache._missing():
            cache.folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder / f".{cache.folder.name}.lock"):
                cache._fill(Stack(model.eval()), windows, batch_size)
        cache._check_meta()
        return cache

    @property
    def nbytes_per_token(self) -> int:
        """Bytes that one token takes on disk."""
        return self._format.record.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that all rows take on disk."""
        return self.nbytes_per_token * self.seq_len * self.count

    def read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What the teacher said about the windows numbered `indices` [B], on the CPU.

        Returns:
            `last_hidden` [B, T, D], or `ids` [B, T, K] and `log_probs` [B, T, K + 1] (`iskd.losses.topk_kl.TopK`).

        Raises:
            ValueError: there is no such window, or a chunk is not what was written.
        """
        rows: NDArray[Any] = np.empty((len(indices), self.seq_len), self._format.record)
        for row, window in enumerate(indices):
            if not 0 <= window < self.count:
                raise ValueError(f"teacher cache {self.folder} has windows 0..{self.count - 1}, and no {window}")
            rows[row] = self._rows(window // self._per_chunk)[window % self._per_chunk]
        return self._format.decode(rows)

    # ---- what it is bound to ----------------------------------------------------------------------------------------

    def _recipe(self, model: PreTrainedModel, windows: Windows, tokenizer: str) -> dict[str, Any]:
        device = model.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kept = {"top_k": self.spec.top_k} if self.spec.kind == "topk" else {"dtype": self.spec.dtype}
        return {
            "version": _VERSION,
            "kind": self.spec.kind,
            **kept,
            "windows": self.count,
            "seq_len": self.seq_len,
            "content": windows_sha256(windows),
            "tokenizer": tokenizer,
            "teacher": model_sha256(model),
            "autocast": str(autocast),
            "windows_per_chunk": self._per_chunk,
        }

    def _check_meta(self) -> None:
        path = self.folder / "meta.json"
        try:
            found = read_json(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!s:.200}): delete the folder {self.folder}") from error
        if found != self.recipe:
            raise ValueError(f"{path} describes another teacher cache: delete the folder {self.folder}")

    # ---- chunks -----------------------------------------------------------------------------------------------------

    @property
    def _chunk_count(self) -> int:
        return -(-self.count // self._per_chunk)

    def _windows_of(self, chunk: int) -> range:
        return range(chunk * self._per_chunk, min(self.count, (chunk + 1) * self._per_chunk))

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.rows"

    def _size(self, chunk: int) -> int:
        """Bytes of a chunk's rows."""
        return len(self._windows_of(chunk)) * self.seq_len * self.nbytes_per_token

    def _missing(self) -> list[int]:
        """Chunks that are not there, or not of their size."""
        return [chunk for chunk in range(self._chunk_count) if not self._has_size(chunk)]

    def _has_size(self, chunk: int) -> bool:
        path = self._path(chunk)
        return path.is_file() and not path.is_symlink() and path.stat().st_size == self._size(chunk) + _SHA256

    def _is_sound(self, chunk: int) -> bool:
        """Whether a chunk of its size holds what was written."""
        size, digest = self._size(chunk), hashlib.sha256()
        with self._path(chunk).open("rb") as file:
            while piece := file.read(min(4 << 20, size)):
                digest.update(piece)
                size -= len(piece)
            return file.read() == digest.digest()

    def _open_chunk(self, chunk: int) -> NDArray[Any]:
        """Rows [windows, seq_len] of a chunk, memory-mapped; hashed once per process."""
        path = self._path(chunk)
        if chunk not in self._checked:
            if not self._has_size(chunk) or not self._is_sound(chunk):
                raise ValueError(
                    f"teacher cache: {path} is missing or not what was written; delete this file and run again, the "
                    "others are kept"
                )
            self._checked.add(chunk)
        shape = (len(self._windows_of(chunk)), self.seq_len)
        return np.memmap(path, dtype=self._format.record, mode="r", shape=shape)

    # ---- build ------------------------------------------------------------------------------------------------------

    def _fill(self, stack: Stack, windows: Windows, batch_size: int) -> None:
        """Write every chunk that is not there or not sound. The caller holds the lock."""
        for rest in self.folder.glob("*.part"):
            rest.unlink()
        _write(self.folder / "meta.json", json.dumps(self.recipe, indent=1).encode())
        left = [c for c in range(self._chunk_count) if not (self._has_size(c) and self._is_sound(c))]
        needed, free = sum(map(self._size, left)), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"teacher.cache={self.spec.kind} needs {needed / 1e9:.1f} GB in {self.folder}, {free / 1e9:.1f} GB are "
                "free; set data.max_train_tokens, teacher.cache=topk with a smaller teacher.top_k, or another cache_dir"
            )
        _log.info("teacher cache %s: %.2f GB in %d chunks to write", self.folder, needed / 1e9, len(left))
        device = stack.model.device
        for chunk in left:
            numbers, path, digest = self._windows_of(chunk), self._path(chunk), hashlib.sha256()
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                for first in range(numbers.start, numbers.stop, batch_size):
                    batch = windows[first : min(first + batch_size, numbers.stop)].astype(np.int64)
                    rows = self._format.encode(stack, torch.from_numpy(batch).to(device)).tobytes()
                    file.write(rows)
                    digest.update(rows)
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            _log.info("teacher cache: %d of %d windows", numbers.stop, self.count)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside the context no other process holds the lock."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.info("another process builds this teacher cache: waiting for it (%s)", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


def windows_sha256(windows: Windows) -> str:
    """Hex SHA-256 of the tokens of windows [windows, seq_len], whatever their integer type."""
    digest = hashlib.sha256()
    for first in range(0, len(windows), _PIECE):
        digest.update(windows[first : first + _PIECE].astype("<u4").tobytes())
    return digest.hexdigest()


def model_sha256(model: PreTrainedModel) -> str:
    """Hex SHA-256 of a model's parameters and of what its config says about what they compute."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VARIABLE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
