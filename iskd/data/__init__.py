"""Text to token windows: sources, readers, splits, shards on disk, the loader of a stage.

Imports: system, models, data/files.
"""

from __future__ import annotations

from iskd.data.framing import BOS, Framing, framing_of
from iskd.data.given import given_texts
from iskd.data.loader import StageLoader
from iskd.data.module import TextData
from iskd.data.overlap import seen_before
from iskd.data.sources import HubDataset, Source, TextFiles

__all__ = [
    "BOS",
    "Framing",
    "HubDataset",
    "Source",
    "StageLoader",
    "TextData",
    "TextFiles",
    "framing_of",
    "given_texts",
    "seen_before",
]
