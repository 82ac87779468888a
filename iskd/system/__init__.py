"""The process and its machine: files, ranks, signals, watchdog, progress, precision, patches.

No model in it, no torch module.

Imports: nothing of iskd.
"""

from __future__ import annotations

from iskd.system.allocator import ask_for_huge_pages

ask_for_huge_pages()  # before torch is imported below; iskd itself imports this room first

from iskd.system.files import Json, file_sha256, read_json, write_whole  # noqa: E402
from iskd.system.progress import Busy, ProgressLine  # noqa: E402
from iskd.system.ranks import Ranks, global_rank  # noqa: E402
from iskd.system.stop_signals import Preempted  # noqa: E402
from iskd.system.text import number  # noqa: E402

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
