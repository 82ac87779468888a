"""Files to documents: what a file is, how it is packed, its rows, the fields of a row; by suffix and content.

Imports: system.
"""

from __future__ import annotations

from iskd.data.files.kinds import KINDS
from iskd.data.files.readers import (
    Placed,
    detokenize_wikitext,
    find_files,
    group_lines,
    placed_files,
    read_as,
    read_file,
)
from iskd.data.files.rows import text_of

__all__ = [
    "KINDS",
    "Placed",
    "detokenize_wikitext",
    "find_files",
    "group_lines",
    "placed_files",
    "read_as",
    "read_file",
    "text_of",
]
