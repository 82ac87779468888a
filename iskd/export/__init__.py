"""The student on disk: written, loaded, verified in a clean process, described by a card.

Code beside exported weights imports `IskdConfig` and `IskdForCausalLM` from here.

Imports: system, plan, models, blocks, evaluation.
"""

from __future__ import annotations

from iskd.export.loading import IskdForCausalLM, load
from iskd.export.storage import STORED
from iskd.export.student import CODES, IskdConfig
from iskd.export.student_files import read_facts, student_folder, tokenizer_of
from iskd.export.verification import verify
from iskd.export.write import export

__all__ = [
    "CODES",
    "STORED",
    "IskdConfig",
    "IskdForCausalLM",
    "export",
    "load",
    "read_facts",
    "student_folder",
    "tokenizer_of",
    "verify",
]
