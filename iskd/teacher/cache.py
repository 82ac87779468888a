"""The teacher cache: what the teacher says about the training windows, said once and read from then on.

One folder per recipe, named by its hash: kind, windows (their very tokens), seq_len, tokenizer, the teacher's weights,
config and attention kernel, precision, kind of device, versions of torch and transformers. In it `meta.json` for the
reader, and the rows (`iskd.teacher.cache_rows`) of every window that somebody asked about (`iskd.teacher.row_store`).

A window that is not there yet, or is not what its digest says, is put to the teacher when it is first read, and the
answer is written down: a run pays for the windows that it trains on and no others, at the step that needs them and on
the process that needs them, so that no process waits for another. Later epochs and later runs read. It pays for several
epochs over fixed text or several runs over it, never for one epoch of one run. `fill` asks about all windows ahead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from iskd.models import Stack, sharding
from iskd.models.weights import model_sha256
from iskd.system import read_json, write_whole
from iskd.system.files import sweep
from iskd.teacher.cache_rows import RowFormat, TeacherCacheSpec
from iskd.teacher.row_store import RowStore

Windows = NDArray[np.integer[Any]]

_VERSION = 2
_PIECE = 1 << 16  # windows hashed at a time
_log = logging.getLogger(__name__)


class TeacherCache:
    """Rows of the training windows, by window number. `open` it; `fill` asks about all windows ahead.

    The teacher is asked where it lies, in the precision that was the caller's when the cache was opened; its weights
    must not change from then on.

    Attributes:
        spec: what is kept. folder: where. nbytes_per_token: size of a row.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Windows, folder: Path, spec: TeacherCacheSpec, tokenizer: str
    ) -> None:
        if sharding.is_sharded(model):
            raise ValueError("teacher.cache needs a whole teacher: build it with trainer=gpu, not with trainer=fsdp")
        self.spec, self._stack, self._windows = spec, Stack(model), windows
        self._format = RowFormat(spec, self._stack)
        self.count, self.seq_len = (int(size) for size in windows.shape)
        self._per_file = max(1, spec.chunk_tokens // self.seq_len)
        self._autocast = autocast_of(model)
        self.recipe = self._recipe(model, windows, tokenizer)
        self.folder = folder / hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:16]
        self._store = RowStore(self.folder, self.count, self.nbytes_per_token * self.seq_len, self._per_file)
        self._writes = True

    @classmethod
    def open(
        cls,
        model: PreTrainedModel,
        windows: Windows,
        folder: Path,
        spec: TeacherCacheSpec | None = None,
        *,
        tokenizer: str = "",
    ) -> TeacherCache:
        """The cache of these windows and this teacher as far as it is there; the rest is made as it is read.

        Args:
            model: the teacher, whole.
            windows: [windows, seq_len] of token ids, may be memory-mapped.
            folder: parent of all caches.
            spec: what is kept.
            tokenizer: hash of the tokenizer (`iskd.data.shards.tokenizer_hash`).

        Raises:
            ValueError: the model is in shards, or another cache lies in the folder.
        """
        cache = cls(model, windows, folder, spec or TeacherCacheSpec(), tokenizer)
        cache._claim()
        there, size = cache.count - len(cache._store.missing()), cache.nbytes / 1e9
        _log.info(
            "teacher cache %s: %d of %d windows are there, all take %.2f GB", cache.folder, there, cache.count, size
        )
        return cache

    def fill(self, *, batch_size: int = 8) -> TeacherCache:
        """Ask about every window that is not there yet, `batch_size` per forward pass; returns the cache.

        One process asks at a time, others wait for it, for as long as it takes, and find the result.

        Raises:
            ValueError: the disk is too small.
        """
        if self._store.missing():
            with _alone(self.folder.parent / f".{self.folder.name}.lock"):
                self._write_missing(batch_size)
        return self

    @property
    def nbytes_per_token(self) -> int:
        """Bytes that one token takes on disk."""
        return self._format.layout.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that all rows take on disk."""
        return self.nbytes_per_token * self.seq_len * self.count

    def read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What the teacher said, or says now, about the windows numbered `indices` [B], on the CPU.

        Returns:
            `last_hidden` [B, T, D], or `ids` [B, T, K] and `log_probs` [B, T, K + 1] (`iskd.losses.topk_kl.TopK`).

        Raises:
            ValueError: there is no such window, or a hidden state is not finite in half precision.
        """
        found: dict[int, NDArray[Any]] = {}
        unknown: list[int] = []
        for window in dict.fromkeys(indices):
            if not 0 <= window < self.count:
                raise ValueError(f"teacher cache {self.folder} has windows 0..{self.count - 1}, and no {window}")
            row = self._store.get(window)
            if row is None:
                unknown.append(window)
            else:
                found[window] = np.frombuffer(row, self._format.layout)
        if unknown:
            found |= self._ask(unknown)
            if self._writes:
                self._keep({window: found[window] for window in unknown})
        return self._format.decode(np.stack([found[window] for window in indices]))

    # ---- what it is bound to ----------------------------------------------------------------------------------------

    def _recipe(self, model: PreTrainedModel, windows: Windows, tokenizer: str) -> dict[str, Any]:
        kept = {"top_k": self.spec.top_k} if self.spec.kind == "topk" else {"dtype": self.spec.dtype}
        return {
            "version": _VERSION,
            "kind": self.spec.kind,
            **kept,
            "windows": self.count,
            "seq_len": self.seq_len,
            "content": windows_sha256(windows),
            "tokenizer": tokenizer,
            **answering(model, self._autocast),
            "windows_per_file": self._per_file,
        }

    def _claim(self) -> None:
        """Write `meta.json` into a new folder, or find there what this cache is."""
        path = self.folder / "meta.json"
        sweep(self.folder)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(self.recipe, indent=1))
        try:
            found = read_json(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!s:.200}): delete the folder {self.folder}") from error
        if found != self.recipe:
            raise ValueError(f"{path} describes another teacher cache: delete the folder {self.folder}")

    # ---- asking the teacher -----------------------------------------------------------------------------------------

    def _ask(self, windows: Sequence[int]) -> dict[int, NDArray[Any]]:
        """Rows [seq_len] by window, from the teacher itself."""
        model = self._stack.model.eval()
        ids = torch.from_numpy(self._windows[list(windows)].astype(np.int64)).to(model.device)
        with torch.autocast(model.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return dict(zip(windows, self._format.encode(self._stack, ids), strict=True))

    def _keep(self, rows: dict[int, NDArray[Any]]) -> None:
        """Write rows down; a run that has them goes on without a place to write."""
        try:
            for window, row in rows.items():
                self._store.put(window, row.tobytes())
        except OSError as error:
            self._writes = False
            message = (
                "teacher cache %s: cannot write (%s); windows that are not there will be put to the teacher each time"
            )
            _log.warning(message, self.folder, error)

    def _write_missing(self, batch_size: int) -> None:
        """Write every window that is not there. The caller holds the lock."""
        left = self._store.missing()
        needed, free = len(left) * self._store.size, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"teacher.cache={self.spec.kind} needs {needed / 1e9:.1f} GB in {self.folder}, {free / 1e9:.1f} GB are "
                "free; set data.max_train_tokens, teacher.cache=topk with a smaller teacher.top_k, or another cache_dir"
            )
        for first in range(0, len(left), batch_size):
            for window, row in self._ask(left[first : first + batch_size]).items():
                self._store.put(window, row.tobytes())
        _log.info("teacher cache %s: %d windows written, %.2f GB", self.folder, len(left), needed / 1e9)


def autocast_of(model: PreTrainedModel) -> torch.dtype | None:
    """The type that products of the model have under the caller's autocast."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def answering(model: PreTrainedModel, autocast: torch.dtype | None) -> dict[str, Any]:
    """All that decides what a teacher says about given tokens, to the last bit."""
    return {
        "teacher": model_sha256(model),
        "attention": str(model.config._attn_implementation),
        "autocast": str(autocast),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "device": model.device.type,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


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


def windows_sha256(windows: Windows) -> str:
    """Hex SHA-256 of the tokens of windows [windows, seq_len], whatever their integer type."""
    digest = hashlib.sha256()
    for first in range(0, len(windows), _PIECE):
        digest.update(windows[first : first + _PIECE].astype("<u4").tobytes())
    return digest.hexdigest()
