"""[shelf] What the student is asked to match, as per-token terms that add up to one scalar.

The terms live one per file (`ce`, `kl`, `hidden`); `base` holds their contract, `chunked` adds them up without whole
logits.

Imports: models.
"""

from __future__ import annotations

from iskd.losses.base import BatchSignals, Terms, check_terms, of_sizes, traits_of
from iskd.losses.chunk_size import Chunk
from iskd.losses.chunked import chunked_vocabulary_loss, naive_vocabulary_loss, total_loss

__all__ = [
    "BatchSignals",
    "Chunk",
    "Terms",
    "check_terms",
    "chunked_vocabulary_loss",
    "naive_vocabulary_loss",
    "of_sizes",
    "total_loss",
    "traits_of",
]
