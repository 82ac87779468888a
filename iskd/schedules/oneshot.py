"""All edits at once, then one healing stage with the whole budget: the shape of most pruning and KD baselines."""

from __future__ import annotations

from typing import Any

from iskd.schedules.base import EditKind
from iskd.schedules.layerwise import LayerSchedule


class Oneshot(LayerSchedule):
    """Every edit in one stage; the other arguments as in `LayerSchedule`."""

    def __init__(self, edit: EditKind, **settings: Any) -> None:
        super().__init__(edit, per_stage=None, **settings)
