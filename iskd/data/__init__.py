"""Text to token windows: sources, readers, splits, shards on disk, the loader of a stage.

Imports: system, models.
"""

from __future__ import annotations

from iskd.data.loader import StageLoader
from iskd.data.module import TextData
from iskd.data.sources import Source, TextFiles, given_texts

__all__ = ["Source", "StageLoader", "TextData", "TextFiles", "given_texts"]
