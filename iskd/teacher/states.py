"""States inside the teacher on windows of text, kept on disk: what refits compare with after every edit of every run.

One folder per teacher and precision, named by its hash, one row store per batch of windows in it, named by its tokens:
row 2 l is the state between attention and MLP of layer l, row 2 l + 1 the state after the layer. States are kept in
the type that they were computed in, so that what is read is what the teacher would say again, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.models import Stack
from iskd.teacher.cache import answering, autocast_of
from iskd.teacher.row_store import RowStore

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
        ids = input_ids.cpu().numpy().astype("<u4")
        name = hashlib.sha256(f"{ids.shape} {like.dtype}".encode() + ids.tobytes()).hexdigest()[:32]
        return BatchStates(self, RowStore(self.folder / name, 2 * self._layers, like.nbytes, 2 * self._layers), like)

    def keep(self, store: RowStore, number: int, row: bytes) -> None:
        """Write a state down; a run that has it goes on without a place to write."""
        if not self._writes:
            return
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            store.put(number, row)
        except OSError as error:
            self._writes = False
            _log.warning("teacher states %s: cannot write (%s); they are computed for each refit", self.folder, error)


class BatchStates:
    """States of one batch of windows, each [B, T, D]. `between`: after the attention of a layer, not after its MLP."""

    def __init__(self, states: TeacherStates, store: RowStore, like: Tensor) -> None:
        self._states, self._store = states, store
        self._shape, self._dtype, self._device = like.shape, like.dtype, like.device

    def get(self, layer: int, *, between: bool = False) -> Tensor | None:
        """A state, or None where nobody has kept it."""
        row = self._store.get(2 * layer + (not between))
        if row is None:
            return None
        return torch.frombuffer(bytearray(row), dtype=self._dtype).view(self._shape).to(self._device)

    def put(self, layer: int, state: Tensor, *, between: bool = False) -> None:
        """Keep a state; one of another type is not kept."""
        if state.dtype == self._dtype:
            row = state.contiguous().cpu().view(torch.uint8).numpy().tobytes()
            self._states.keep(self._store, 2 * layer + (not between), row)
