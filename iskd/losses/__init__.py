"""Losses: what the student is asked to match, as per-token terms that add up to one scalar.

The terms live one per file (`ce`, `kl`, `hidden`); `base` holds their contract, `chunked` adds them up.
"""

from __future__ import annotations

from iskd.losses.base import Head, Loss, Terms
from iskd.losses.chunked import chunked_vocabulary_loss, naive_vocabulary_loss, total_loss

__all__ = ["Head", "Loss", "Terms", "chunked_vocabulary_loss", "naive_vocabulary_loss", "total_loss"]
