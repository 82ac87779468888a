"""All edits at once, then one healing stage with the whole budget: the shape of most pruning and KD baselines."""

from __future__ import annotations

from dataclasses import dataclass

from iskd.schedules.layerwise import LayerSchedule


@dataclass(frozen=True)
class Oneshot(LayerSchedule):
    """Every edit in one stage; keys as in `LayerSchedule`."""
