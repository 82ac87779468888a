"""Streams of many windows: on the device, in host memory or on disk, so that text is not bounded by the device."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from iskd.system.files import draft_of, sweep

PLACES = ("device", "host", "disk")


class Streams:
    """One tensor for each batch of windows.

    Args:
        place: where they lie, one of `PLACES`. device: where they are needed.
    """

    def __init__(self, place: str, device: torch.device) -> None:
        self._place, self._device = place, device
        self._kept: dict[int, Tensor] = {}
        self._folder = draft_of(Path(tempfile.gettempdir()) / "streams") if place == "disk" else None
        if self._folder is not None:
            sweep(self._folder.parent)  # those of killed processes
            self._folder.mkdir(mode=0o700)
            # a refit that is broken off leaves none; TemporaryDirectory would warn of a folder that nobody has closed
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __setitem__(self, index: int, value: Tensor) -> None:
        if self._folder is not None:
            file = self._folder / str(index)
            if index not in self._kept:
                kept = torch.from_file(str(file), shared=True, size=value.numel(), dtype=value.dtype)
                self._kept[index] = kept.view(value.shape)
            self._kept[index].copy_(value)
        else:
            self._kept[index] = value if self._place == "device" else value.cpu()

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        return kept.clone() if self._folder is not None else kept.to(self._device)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
