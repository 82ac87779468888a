"""Progressive compression: a few edits, heal, a few more (ISKD, COLING 2025; one block per stage there)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from iskd.schedules.layerwise import LayerSchedule


@dataclass(frozen=True)
class Iterative(LayerSchedule):
    """`per_stage` layers at a time, an equal share of the tokens after each; other keys as in `LayerSchedule`.

    Source: ISKD (COLING 2025, 2025.coling-main.440); with removals and `rescore`: ILD (arXiv 2511.05085)
    Needs: tokens for every stage
    Costs: a measurement and, with `rescore`, a scoring for every stage
    Measured: KL 0.73, 30 % of the block parameters out (experiments/iskd-smollm2/README.md); ILD: KL 0.327 and 0.320
        at 26 layers of 30 (experiments/ild-smollm2/README.md)
    """

    _: KW_ONLY
    per_stage: int | None = 1

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.per_stage is not None and self.per_stage < 1:
            raise ValueError(f"schedule.per_stage must be at least 1, got {self.per_stage}")

    @property
    def edits_per_stage(self) -> int | None:
        """Edits of every stage but the last; None = all in one."""
        return self.per_stage
