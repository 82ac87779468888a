"""What is done to a layer: replace its block, remove it, merge it, convert its attention. Group `edit` of the config.

Each kind makes the edit of one layer, a frozen value. `takes` names the groups of the config whose choice it puts in
(`block`, `mixer`); that choice is passed as data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import NonNegativeFloat

from iskd.plan import Convert, Edit, Remove, Replace, Spec
from iskd.plan.edits import Merge

EVERY = {"even": 0, "odd": 1}
"""Words for layers, by what is left of their number when it is halved."""


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

    The two are put side by side and pruned back to one block of the teacher's own sizes, heads by their share in the
    stream, channels by elimination; by held-out KL, before any refit, that or plain removal stays. Where the two have
    other positions or windows (SmolLM3, Qwen3), the upper one is removed, and the record says so. `ridge`: how strongly
    the fit holds on to inherited weights, null = as text that is held out says. Layer 0 is never edited.

    Source: FlattenGPT (arXiv 2602.08858), CoMe (arXiv 2510.15304); channels leave as in ZipLM (arXiv 2302.04089)
    Needs: an importance, or an order; calibration tokens (`run.fit_tokens`)
    Costs: a fit for every layer, on twice the channels of a block; the cache of the layer goes with it
    Measured: not measured
    """

    takes: ClassVar[tuple[str, ...]] = ()
    removes: ClassVar[bool] = True
    ridge: NonNegativeFloat | None = None
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

    `mixers`: other mixers than `mixer`, by name: each with the layers that get it, a list or a word of `EVERY`.

    Source: arXiv 2504.14366
    Needs: a mixer (`mixer=`)
    Costs: that of the mixer; a state of constant size instead of a cache that grows
    Measured: 70.8 % of the teacher's accuracy, all of SmolLM2-135M converted
        (experiments/subquadratic-smollm2/README.md)
    """

    takes: ClassVar[tuple[str, ...]] = ("mixer",)
    removes: ClassVar[bool] = False
    mixer: Spec
    mixers: Mapping[str, Any] | None = None  # name -> (Spec, layers)
    fit: bool = False

    def __post_init__(self) -> None:
        """Refuse a fit, which would silently do nothing, and a layer with two mixers."""
        found: dict[int, str] = {}
        for name, (_, layers) in (self.mixers or {}).items():
            if isinstance(layers, str):
                if layers not in EVERY:
                    raise ValueError(
                        f"edit.mixers={{{name}: {layers}}}: say which layers, as a list or as {' or '.join(EVERY)}"
                    )
            elif not layers or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
                raise ValueError(
                    f"edit.mixers={{{name}: {list(layers)}}}: give at least one layer, each a whole number"
                )
            for layer in self._shown(layers):
                if layer in found:
                    twice = "twice" if found[layer] == name else f"for {found[layer]} and"
                    raise ValueError(f"edit.mixers names layer {layer} {twice} for {name}: a layer has one mixer")
                found[layer] = name
        if self.fit:
            raise ValueError("edit.fit=true: mixers have no fit before training; set edit.fit=false")

    def make(self, layer: int, seed: int) -> Convert:
        """The edit of one layer; the seed of its fresh weights depends on run seed and layer only."""
        name = self.entry_of(layer)
        mixer = self.mixer if name is None or self.mixers is None else self.mixers[name][0]
        return Convert(layer, mixer, seed=seed * 10_007 + layer)

    @property
    def every(self) -> list[Spec]:
        """All mixers that layers may get."""
        return [self.mixer, *(mixer for mixer, _ in (self.mixers or {}).values())]

    def check(self, depth: int) -> None:
        """Raise ValueError where a layer is named that a teacher of so many layers has not."""
        for name, (_, layers) in (self.mixers or {}).items():
            far = [] if isinstance(layers, str) else [layer for layer in layers if not 0 <= layer < depth]
            if far:
                raise ValueError(
                    f"edit.mixers={{{name}: ...}} names layer {far[0]}; the teacher has layers 0..{depth - 1}"
                )

    def check_used(self, converted: Collection[int], *, all_listed: bool = True) -> None:
        """Raise ValueError where an entry of `mixers` would silently do nothing.

        Args:
            converted: the layers that are converted.
            all_listed: whether each layer of a list has to be among them; else one of an entry's, as for words.
        """
        for name, (_, layers) in (self.mixers or {}).items():
            hit = [layer for layer in sorted(converted) if _among(layer, layers)]
            idle = [] if isinstance(layers, str) else [layer for layer in layers if layer not in converted]
            if hit and not (idle and all_listed):
                continue
            what = f"layers that are {layers}" if isinstance(layers, str) else f"layer {', '.join(map(str, idle))}"
            found = ", ".join(map(str, sorted(converted))) or "none"
            raise ValueError(
                f"edit.mixers={{{name}: {layers}}}: {what} would not be converted; those that are converted: {found}. "
                "Name some of these, or drop what is named in vain"
            )

    def entry_of(self, layer: int) -> str | None:
        """The entry of `mixers` that a layer gets its mixer from; None = it gets `mixer`."""
        return next((name for name, (_, layers) in (self.mixers or {}).items() if _among(layer, layers)), None)

    def _shown(self, layers: str | Sequence[int]) -> list[int]:
        """Layers of a list; of a word, those up to the highest that any list names and the next two."""
        if not isinstance(layers, str):
            return list(layers)
        lists = (named for _, named in (self.mixers or {}).values() if not isinstance(named, str))
        return [layer for layer in range(max((max(named) for named in lists), default=0) + 3) if _among(layer, layers)]


def _among(layer: int, layers: str | Sequence[int]) -> bool:
    return layer % 2 == EVERY[layers] if isinstance(layers, str) else layer in layers


EditKind = ReplaceWith | RemoveLayers | MergeLayers | ConvertTo
