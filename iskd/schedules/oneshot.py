"""All edits at once, then one healing stage with the whole budget: the shape of most pruning and KD baselines."""

from __future__ import annotations

from typing import Any

from iskd.schedules.base import EditKind
from iskd.schedules.layerwise import LayerSchedule


class Oneshot(LayerSchedule):
    """Every edit in one stage; the other arguments as in `LayerSchedule`.

    Source: the shape of ShortGPT (arXiv 2403.03853) and of distillation into a fixed student
    Needs: nothing
    Costs: one measurement
    Measured: ShortGPT, healed: KL 0.53 at 23 layers of 30 (experiments/ild-smollm2/README.md); distillation into a
        fixed student: KL 1.33 (experiments/iskd-smollm2/README.md)
    """

    def __init__(self, edit: EditKind, **settings: Any) -> None:
        super().__init__(edit, per_stage=None, **settings)
