"""[shelf] Subquadratic mixers, which stand where attention stood.

A mixer writes its `streams`; `base` makes a layer of them, `ops` holds the recurrence, `modules` the small layers.

Imports: models, mixers.ops, mixers.modules.
"""

from __future__ import annotations

from iskd.mixers.base import Attention, Context, RecurrentMixer, Streams

__all__ = ["Attention", "Context", "RecurrentMixer", "Streams"]
