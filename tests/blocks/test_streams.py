"""States of windows come back as they were put, on the device that needs them, from every place."""

from __future__ import annotations

import errno
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from iskd.blocks import streams
from iskd.blocks.streams import Streams, enter
from iskd.models import Stack
from iskd.models.packing import Separator
from iskd.plan.options import PLACES
from tests.factories import FAMILIES, hooks, louder, tiny, windows


@pytest.mark.parametrize("place", PLACES)
def test_what_lies_elsewhere_comes_back_to_the_device(place: str, tmp_path: Path) -> None:
    """The meta device stands for an accelerator: it is another one than the host's."""
    if place != "device":
        found = Streams(place, torch.device("meta"), tmp_path)
        found[0] = torch.ones(2, 3, 4)
        assert (found[0].device.type, found[0].shape) == ("meta", (2, 3, 4))
    here = Streams(place, torch.device("cpu"), tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        values = [torch.randn(2, 3, 4).to(dtype) for _ in range(2)]
        here = Streams(place, torch.device("cpu"), tmp_path)
        here[0] = values[0]
        first = here[0]
        here[0] = values[1]
        assert torch.equal(first, values[0]), "what was read stays as it is"
        assert torch.equal(here[0], values[1])


def test_files_lie_in_the_folder_and_are_gone_with_the_streams(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "streams"
    found = Streams("disk", torch.device("cpu"), folder)
    found[0] = torch.ones(2, 3, 4)
    assert [path.stat().st_size for path in folder.rglob("*") if path.is_file()] == [96]
    del found
    gc.collect()
    assert not list(folder.iterdir())


def test_a_full_disk_is_an_error_that_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is taken before a file is mapped: a write into a map of a full disk would end the process."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streams.os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"no room in .*cache_dir.*streams=host"):
        Streams("disk", torch.device("cpu"), tmp_path)[0] = torch.ones(2)


@torch.no_grad()
@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize("family", [*FAMILIES, *(f"{family} apart" for family in FAMILIES if family != "opt")])
def test_blocks_called_one_by_one_on_many_batches_are_the_model(family: str, place: str, tmp_path: Path) -> None:
    """Masks and positions are kept once for batches of a shape, or with documents apart where the streams lie."""
    model = louder(tiny(family.split()[0]))
    stack, apart = Stack(model), family.endswith("apart")
    stack.keep_apart(Separator(7) if apart else None)
    batches = [windows(2, 20, seed=1), windows(3, 20, seed=2), windows(2, 20, seed=3)]
    for number, batch in enumerate(batches):
        batch[:, 4 + number] = 7
    stream, beside = (Streams(place, torch.device("cpu"), tmp_path) for _ in range(2))
    calls = enter(stack, batches, stream, beside)
    assert len({id(each) for each in calls}) == (3 if apart else 2)
    assert (len(beside) > 0) == apart
    tensors = [value for each in calls for call in each._calls for value in tree_leaves((call.args, call.kwargs))]
    assert not apart or not any(isinstance(value, Tensor) for value in tensors)
    for position, block in enumerate(stack.layers):
        for index, call in enumerate(calls):
            stream[index] = call.run(position, block, stream[index])
    for index, batch in enumerate(batches):
        assert torch.equal(stack.final_norm(stream[index]), stack.last_hidden(batch))
    assert hooks(model) == 0
