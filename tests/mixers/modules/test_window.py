"""The window's cache: what it counts stays exact in every precision."""

from __future__ import annotations

import pytest
import torch

from iskd.mixers.modules import Context
from iskd.mixers.modules.window import _sinks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [3, 256, 259, 299])
def test_sinks_of_the_cache_are_counted_exactly(held: int, dtype: torch.dtype) -> None:
    """Sums of half precision are whole numbers up to 256 alone; one sink too many would be a token of the window."""
    count = 300
    flags = (torch.arange(count) < held).to(dtype).unsqueeze(0)
    rows = torch.zeros(1, count, 1, 2, dtype=dtype)
    context = Context(None, torch.tensor([[held]]), past=[rows, rows, flags])
    k = torch.ones(1, 1, 1, 2, dtype=dtype)
    found = _sinks(context, k, k, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long), count)
    assert found.places.tolist() == [[held]]
    assert int((context.last[2] > 0).sum()) == held + 1
    assert torch.equal(found.k[0, held] if found.k.dim() == 4 else found.k[0, 0, held], k[0, 0])
