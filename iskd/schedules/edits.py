"""What is done to a layer: replace its block, remove it, merge it, convert its attention. Group `edit` of the config.

Each kind makes the edit of one layer, a frozen value. `takes` names the groups of the config whose choice it puts in
(`block`, `mixer`); that choice is passed as data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeFloat

from iskd.plan import Convert, Edit, Remove, Replace, Spec
from iskd.plan.edits import Merge


@dataclass(frozen=True)
class ReplaceWith:
    """Edits that put a compact block in. `fit`: fit it to the replaced block before training.

    Source: ISKD (COLING 2025, 2025.coling-main.440)
    Needs: a block (`block=`)
    Costs: a fit for every layer with `edit.fit`
    Measured: KL 0.73, 30 % of the block parameters out (experiments/iskd-smollm2/README.md)
    """

    takes: ClassVar[tuple[str, ...]] = ("block",)
    removes: ClassVar[bool] = False
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
    removes: ClassVar[bool] = True
    fit: bool = False

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer."""
        return Remove(layer)


@dataclass(frozen=True)
class MergeLayers:
    """Edits that take a layer out, whose best heads and channels the block below takes over where that is better.

    The two are put side by side and pruned back to one block of the teacher's own sizes; by held-out KL that or plain
    removal stays. `ridge`: how strongly the fit holds on to inherited weights. Layer 0 is never edited.

    Source: FlattenGPT (arXiv 2602.08858), CoMe (arXiv 2510.15304); channels leave as in ZipLM (arXiv 2302.04089)
    Needs: an importance, or an order; calibration tokens (`run.fit_tokens`)
    Costs: a fit for every layer, on twice the channels of a block; the cache of the layer goes with it
    Measured: not measured
    """

    takes: ClassVar[tuple[str, ...]] = ()
    removes: ClassVar[bool] = True
    ridge: NonNegativeFloat = 0.1
    fit: bool = True

    def __post_init__(self) -> None:
        """Refuse what would silently be a removal."""
        if not self.fit:
            raise ValueError("edit.fit=false: layers are merged by a fit; use edit=remove")

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer."""
        return Merge(layer, self.ridge)


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
    removes: ClassVar[bool] = False
    mixer: Spec
    fit: bool = False

    def __post_init__(self) -> None:
        """Refuse a fit, which would silently do nothing."""
        if self.fit:
            raise ValueError("edit.fit=true: mixers have no fit before training; set edit.fit=false")

    def make(self, layer: int, seed: int) -> Edit:
        """The edit of one layer; the seed of its fresh weights depends on run seed and layer only."""
        return Convert(layer, self.mixer, seed=seed * 10_007 + layer)


EditKind = ReplaceWith | RemoveLayers | MergeLayers | ConvertTo
