"""States inside the teacher on windows of text, kept on disk: what refits compare with after every edit of every run.

One folder per teacher and precision, named by its hash, one row store per window in it, named by its tokens: row 2 l
is the state between attention and MLP of layer l, row 2 l + 1 the state after the layer. So every refit finds what any
other one has kept, however many windows it runs at a time. States are kept in the type that they were computed in: what
is read is what the teacher would say again, to the last bit in a batch as large, to its rounding in another one. They
take 2 L D numbers a token at most, and nothing is written where little room is left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from iskd.models import Stack
from iskd.teacher.cache import answering, autocast_of
from iskd.teacher.row_store import RowStore

_SPARE = 1 << 30  # bytes of a disk that states never take
_log = logging.getLogger(__name__)


class TeacherStates:
    """States of one teacher in one precision, for any batch of windows.

    Args:
        model: the teacher, whole; its weights must not change from then on. Its precision is that of the caller.
        folder: parent of all states; what is below it is made when the first state is kept.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        recipe = json.dumps({"kind": "states", **answering(model, autocast_of(model))}, sort_keys=True)
        self.folder = folder / hashlib.sha256(recipe.encode()).hexdigest()[:16]
        self._layers = len(Stack(model).layers)
        self._writes = True

    def of(self, input_ids: Tensor, like: Tensor) -> BatchStates:
        """The states of one batch [B, T]; `like`: one of them, for shape, type and device."""
        return BatchStates(self, [self._store(ids, like) for ids in input_ids.cpu().numpy().astype("<u4")], like)

    def _store(self, ids_T: NDArray[np.uint32], like: Tensor) -> RowStore:
        """Of one window."""
        name = hashlib.sha256(f"{ids_T.shape} {like.dtype}".encode() + ids_T.tobytes()).hexdigest()[:32]
        return RowStore(self.folder / name, 2 * self._layers, like[0].nbytes, 2 * self._layers)

    def keep(self, store: RowStore, number: int, row: bytes) -> None:
        """Write a state down; a run that has it goes on without a place to write."""
        if not self._writes:
            return
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(store.folder).free) < _SPARE:
                raise OSError(errno.ENOSPC, f"{free / 1e9:.1f} GB are free, which are left to the run's checkpoints")
            store.put(number, row)
        except OSError as error:
            self._writes = False
            _log.warning("teacher states %s: cannot write (%s); they are computed for each refit", self.folder, error)


class BatchStates:
    """States of one batch of windows, each [B, T, D]. `between`: after the attention of a layer, not after its MLP."""

    def __init__(self, states: TeacherStates, stores: Sequence[RowStore], like: Tensor) -> None:
        self._states, self._stores = states, stores
        self._shape, self._dtype, self._device = like.shape, like.dtype, like.device

    def get(self, layer: int, *, between: bool = False) -> Tensor | None:
        """A state, or None where nobody has kept it."""
        rows = bytearray()
        for store in self._stores:
            if (row := store.get(2 * layer + (not between))) is None:
                return None
            rows += row
        return torch.frombuffer(rows, dtype=self._dtype).view(self._shape).to(self._device)

    def put(self, layer: int, state: Tensor, *, between: bool = False) -> None:
        """Keep a state; one of another type is not kept."""
        if state.dtype == self._dtype:
            for store, window in zip(self._stores, state.cpu(), strict=True):
                row = window.contiguous().view(torch.uint8).numpy().tobytes()
                self._states.keep(store, 2 * layer + (not between), row)
