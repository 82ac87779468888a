"""Streams of many windows: on the device, in host memory or on disk, so that text is not bounded by the device.

Fits and refits walk through a model block by block, and between two blocks the states of all windows have to lie
somewhere. Beside them a walk keeps how the host calls its blocks (`enter`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from iskd.models import Stack
from iskd.models.block_calls import BlockCalls
from iskd.models.capture import begins_with
from iskd.system.files import draft_of, sweep


class Streams:
    """One tensor for each batch of windows.

    Args:
        place: where they lie, one of `PLACES`.
        device: where they are needed, and come back to.
        folder: of the files of `place="disk"`; None = where the system keeps temporary files, which may be memory.
    """

    def __init__(self, place: str, device: torch.device, folder: Path | None = None) -> None:
        self._place, self._device = place, device
        self._kept: dict[int, Tensor] = {}
        self._folder = draft_of((folder or Path(tempfile.gettempdir())) / "streams") if place == "disk" else None
        if self._folder is not None:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            sweep(self._folder.parent)  # those of killed processes
            self._folder.mkdir(mode=0o700)
            # a refit that is broken off leaves none; TemporaryDirectory would warn of a folder that nobody has closed
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __setitem__(self, index: int, value: Tensor) -> None:
        if self._folder is not None:
            file = self._folder / str(index)
            if index not in self._kept:
                _take_room(file, value.nbytes)
                kept = torch.from_file(str(file), shared=True, size=value.numel(), dtype=value.dtype)
                self._kept[index] = kept.view(value.shape)
            self._kept[index].copy_(value)
        else:
            self._kept[index] = value if self._place == "device" else value.cpu()

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        # of a file a copy, as later values are written into it
        return kept.to(self._device, copy=self._folder is not None)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def enter(stack: Stack, batches: Sequence[Tensor], into: Streams, beside: Streams) -> list[BlockCalls]:
    """Put the states that enter a model's first block into a stream; returns how its blocks are called on each batch.

    What blocks are given beside the stream depends on a batch's shape alone, and is kept once for each. Only with
    documents apart every batch has masks and positions of its own, which go where the stream does.

    Args:
        stack: the model.
        batches: windows [B, T] on its device.
        into: of the states [B, T, D].
        beside: of masks and positions.
    """
    as_tuple = begins_with(stack, batches[0][:1, :2])
    shapes: dict[torch.Size, BlockCalls] = {}
    found = []

    def put(tensor: Tensor) -> Callable[[], Tensor]:
        number = len(beside)
        beside[number] = tensor
        return lambda: beside[number]

    for index, batch in enumerate(batches):
        calls = BlockCalls(stack, batch, as_tuple)
        into[index] = calls.hand_over()
        if stack.separator is None:
            calls = shapes.setdefault(batch.shape, calls)
        else:
            calls.lay(put)
        found.append(calls)
    return found


def _take_room(file: Path, size: int) -> None:
    """Make a file of so many bytes.

    Raises OSError where there is no room; to write into a map of a file without would end the process.
    """
    try:
        with file.open("xb") as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, max(size, 1))
            else:
                opened.write(bytes(size))
    except OSError as error:
        free = shutil.disk_usage(file.parent).free
        raise OSError(
            error.errno,
            f"the states of all windows have no room in {file.parent.parent} ({free / 2**30:.1f} GiB free, "
            f"{error.strerror}): set cache_dir to a larger disk, refit.NAME.streams=host (run.fit_streams=host), "
            "or fewer refit.NAME.tokens (run.fit_tokens)",
        ) from error
