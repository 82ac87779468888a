"""What is done to a layer: replace its block, remove it, convert its attention. Group `edit` of the config.

Each kind makes the edit of one layer, a frozen value. `takes` names the groups of the config whose choice it puts in
(`block`, `mixer`); that choice is passed as data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from iskd.plan import Convert, Edit, Remove, Replace, Spec


@dataclass(frozen=True)
class ReplaceWith:
    """Edits that put a compact block in. `fit`: fit it to the replaced block before training."""

    takes: ClassVar[tuple[str, ...]] = ("block",)
    block: Spec
    fit: bool = True

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer; the seed of its fresh weights depends on run seed and layer only."""
        return Replace(layer, self.block, seed=seed * 10_007 + layer)


@dataclass(frozen=True)
class RemoveLayers:
    """Edits that take a layer out."""

    takes: ClassVar[tuple[str, ...]] = ()
    fit: bool = False

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer."""
        return Remove(layer)


@dataclass(frozen=True)
class ConvertTo:
    """Edits that exchange a block's attention for a mixer, which starts from the attention's own projections."""

    takes: ClassVar[tuple[str, ...]] = ("mixer",)
    mixer: Spec
    fit: bool = False

    def __post_init__(self) -> None:
        """Refuse a fit, which would silently do nothing."""
        if self.fit:
            raise ValueError("edit.fit=true: mixers have no fit before training; set edit.fit=false")

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer; the seed of its fresh weights depends on run seed and layer only."""
        return Convert(layer, self.mixer, seed=seed * 10_007 + layer)


EditKind = ReplaceWith | RemoveLayers | ConvertTo
