"""Progressive compression: a few edits, heal, a few more (ISKD, COLING 2025; one block per stage there)."""

from __future__ import annotations

from iskd.schedules.layerwise import LayerSchedule


class Iterative(LayerSchedule):
    """`per_stage` layers at a time, an equal share of the tokens after each; arguments as in `LayerSchedule`.

    Source: ISKD (COLING 2025, 2025.coling-main.440); with removals and `rescore`: ILD (arXiv 2511.05085)
    Needs: tokens for every stage
    Costs: a measurement and, with `rescore`, a scoring for every stage
    Measured: KL 0.73, 11 blocks replaced one by one (experiments/iskd-smollm2/README.md); ILD: KL 0.59 at 23 layers of
        30 (experiments/ild-smollm2/README.md)
    """
