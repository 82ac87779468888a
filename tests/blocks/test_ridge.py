"""Sums of least squares are of whole float32 products, whatever precision the run allows elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iskd.blocks import Ridge, ridge


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_no_lower_precision_comes_into_the_sums(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, size, generator=generator) for size in (48, 8))
    seen: list[str] = []
    original = ridge._gram

    def noted(*args: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return original(*args)

    monkeypatch.setattr(ridge, "_gram", noted)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        system = Ridge(48, 8, bias=False, device=torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            system.add(x, y, torch.ones(64, 1))
        assert torch.get_float32_matmul_precision() == precision, "it is the run's again"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]
    expected = torch.cat([x.double().T @ x.double(), x.double().T @ y.double()], 1)
    torch.testing.assert_close(system.sums[:-1], expected, rtol=1e-5, atol=1e-4)
