"""All edits at once, then one healing stage with the whole budget: the shape of most pruning and KD baselines."""

from __future__ import annotations

from dataclasses import dataclass

from iskd.schedules.layerwise import LayerSchedule


@dataclass(frozen=True)
class Oneshot(LayerSchedule):
    """Every edit in one stage; keys as in `LayerSchedule`.

    Source: the shape of ShortGPT (arXiv 2403.03853) and of distillation into a fixed student
    Needs: nothing
    Costs: one measurement
    Measured: ShortGPT, healed: KL 0.53 at 23 layers of 30 (experiments/ild-smollm2/README.md); distillation into a
        fixed student: KL 1.33 (experiments/iskd-smollm2/README.md)
    """
