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
    """Edits that put a compact block in. `fit`: fit it to the replaced block before training.

    Source: ISKD (COLING 2025, 2025.coling-main.440)
    Needs: a block (`block=`)
    Costs: a fit for every layer with `edit.fit`
    Measured: KL 0.73, 30 % of the block parameters out (experiments/iskd-smollm2/README.md)
    """

    takes: ClassVar[tuple[str, ...]] = ("block",)
    block: Spec
    fit: bool = True

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer; the seed of its fresh weights depends on run seed and layer only."""
        return Replace(layer, self.block, seed=seed * 10_007 + layer)


@dataclass(frozen=True)
class RemoveLayers:
    """Edits that take a layer out.

    Source: ShortGPT (arXiv 2403.03853), ILD (arXiv 2511.05085)
    Needs: an importance, or an order
    Costs: nothing; the cache of the layer goes with it
    Measured: KL 0.53 at 23 layers of 30 (experiments/ild-smollm2/README.md); KL 0.72 at 20
        layers of 30 (experiments/ild-smollm2/README.md)
    """

    takes: ClassVar[tuple[str, ...]] = ()
    fit: bool = False

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer."""
        return Remove(layer)


@dataclass(frozen=True)
class ConvertTo:
    """Edits that exchange a block's attention for a mixer, which starts from the attention's own projections.

    Source: arXiv 2504.14366
    Needs: a mixer (`mixer=`)
    Costs: that of the mixer; a state of constant size instead of a cache that grows
    Measured: 70.8 % of the teacher's accuracy, all of SmolLM2-135M converted
        (experiments/subquadratic-smollm2/README.md)
    """

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
