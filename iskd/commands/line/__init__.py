"""The command line before a command runs: what there is, help, completion, what a mistyped word may mean, errors.

It answers at once: no Hydra, no torch.

Imports: system.
"""

from __future__ import annotations

from iskd.commands.line.keys import roots_known, unknown_key
from iskd.commands.line.parser import parse
from iskd.commands.line.telling import FULL_ERROR, in_own_words, told

__all__ = [
    "FULL_ERROR",
    "in_own_words",
    "parse",
    "roots_known",
    "told",
    "unknown_key",
]
