"""The process and its machine: files, ranks, signals, watchdog, progress, precision, patches.

No model in it, no torch module.

Imports: nothing of iskd.
"""

from __future__ import annotations

from iskd.system.files import Json, file_sha256, read_json, write_whole
from iskd.system.progress import Busy, ProgressLine
from iskd.system.ranks import Ranks, global_rank
from iskd.system.stop_signals import Preempted
from iskd.system.text import number

__all__ = [
    "Busy",
    "Json",
    "Preempted",
    "ProgressLine",
    "Ranks",
    "file_sha256",
    "global_rank",
    "number",
    "read_json",
    "write_whole",
]
