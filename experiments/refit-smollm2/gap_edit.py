"""Baseline of this comparison: of every gap one layer becomes a linear block, and the others go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from iskd.plan import Edit, Remove, Replace, Spec


@dataclass(frozen=True)
class LinearAtGaps:
    """Edits that put a linear block in the place of the listed layers and take all others out."""

    takes: ClassVar[tuple[str, ...]] = ()
    linear: Sequence[int]
    fit: bool = True

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer."""
        block = Spec("iskd.blocks.linear.Linear", {})
        return Replace(layer, block, seed=seed * 10_007 + layer) if layer in self.linear else Remove(layer)
