"""Progressive compression: a few edits, heal, a few more (ISKD, COLING 2025; one block per stage there)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from iskd.schedules.base import History
from iskd.schedules.layerwise import LayerSchedule


@dataclass(frozen=True)
class Iterative(LayerSchedule):
    """`per_stage` layers at a time, an equal share of the tokens after each; other keys as in `LayerSchedule`.

    Attributes:
        per_stage: edits at a time.
        contiguous: after the first edit only the neighbours of what is edited: removals then leave one gap, which a
            refit makes up for better than for several, on SmolLM2-135M (experiments/refit-smollm2/README.md).

    Source: ISKD (COLING 2025, 2025.coling-main.440); with removals and `rescore`: ILD (arXiv 2511.05085)
    Needs: tokens for every stage
    Costs: a measurement and, with `rescore`, a scoring for every stage
    Measured: KL 0.50, 30 % of the block parameters out (experiments/iskd-smollm2/README.md); ILD: KL 0.33 and 8.5 % of
        four tasks lost at 23 layers of 30 (experiments/ild-smollm2/README.md)
    """

    _: KW_ONLY
    per_stage: int | None = 1
    contiguous: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.per_stage is not None and self.per_stage < 1:
            raise ValueError(f"schedule.per_stage must be at least 1, got {self.per_stage}")
        if self.contiguous and self.per_stage != 1:
            raise ValueError("schedule.contiguous=true takes one layer at a time: set schedule.per_stage=1")

    @property
    def edits_per_stage(self) -> int | None:
        """Edits of every stage but the last; None = all in one."""
        return self.per_stage

    def chosen(self, history: History) -> list[int] | None:
        """As in `LayerSchedule`; which neighbours come later is decided then."""
        return None if self.contiguous else super().chosen(history)

    def open_among(self, available: Sequence[int], history: History) -> list[int]:
        """The layers on either side of those that are edited, with `contiguous`; else all.

        Raises:
            ValueError: neither of them may be edited.
        """
        if not self.contiguous or not history.own:
            return list(available)
        own, others = history.own, set(history.record.layers) - set(history.own)
        below, above = (layer for layer in others if layer < own[0]), (layer for layer in others if layer > own[-1])
        sides = {max(below, default=-1), min(above, default=-1)}
        found = [layer for layer in available if layer in sides]
        if not found:
            raise ValueError(
                f"schedule.contiguous=true: the layers beside {own[0]} to {own[-1]} may not be edited (protected, or "
                "there are none); edit fewer, protect fewer, or set schedule.contiguous=false"
            )
        return found
