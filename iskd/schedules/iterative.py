"""Progressive compression: a few edits, heal, a few more (ISKD, COLING 2025; one block per stage there)."""

from __future__ import annotations

from iskd.schedules.layerwise import LayerSchedule


class Iterative(LayerSchedule):
    """`per_stage` layers at a time, an equal share of the tokens after each; arguments as in `LayerSchedule`."""
