"""What a window is made of, beside the obvious way."""

from __future__ import annotations

import pytest
import torch

from iskd.mixers.ops.window import running_maximum


@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (2, 7), (1, 64), (2, 37, 4)])
def test_a_running_maximum_is_cummax(shape: tuple[int, ...]) -> None:
    numbers = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(running_maximum(numbers), numbers.cummax(1).values)
