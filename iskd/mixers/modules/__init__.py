"""Small layers and checks that several mixers are made of.

Imports: mixers/ops, models.
"""

from __future__ import annotations

from iskd.mixers.modules.context import Context
from iskd.mixers.modules.layers import HeadNorm, OutputGate, Rotary, ShortConv
from iskd.mixers.modules.limits import check_count, check_memory, check_number
from iskd.mixers.modules.projections import Projections

__all__ = [
    "Context",
    "HeadNorm",
    "OutputGate",
    "Projections",
    "Rotary",
    "ShortConv",
    "check_count",
    "check_memory",
    "check_number",
]
