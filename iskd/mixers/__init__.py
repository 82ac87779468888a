"""[shelf] Subquadratic mixers, which stand where attention stood.

A mixer writes its `streams`; `base` makes a layer of them, `ops` holds the recurrence, `modules` the small layers.

Imports: models, mixers.ops, mixers.modules.
"""

from __future__ import annotations

from iskd.mixers.base import Attention, RecurrentMixer, Streams
from iskd.mixers.modules import Context

__all__ = ["Attention", "Context", "RecurrentMixer", "Streams"]
