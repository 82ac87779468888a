"""A transformers model seen as a stack of layers: families, surgery, capture, cache, head, weights, shards.

The only room that knows attribute paths inside transformers' models.

Imports: system, plan.
"""

from __future__ import annotations

from iskd.models.cache import CacheSlot
from iskd.models.capture import scoring
from iskd.models.head import Head, at_least_fp32, autocast_head, cap_logits, project
from iskd.models.signals import IGNORE, Signals
from iskd.models.stack import Stack

__all__ = [
    "IGNORE",
    "CacheSlot",
    "Head",
    "Signals",
    "Stack",
    "at_least_fp32",
    "autocast_head",
    "cap_logits",
    "project",
    "scoring",
]
