"""A matrix peak that is measured in no time."""

from __future__ import annotations

import pytest

from iskd.training.step import flops


@pytest.fixture
def _small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_SHAPES", {"cpu": ((64, 64, 64),)})
