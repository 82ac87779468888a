"""Benchmarks, each a module to run from the repository's root: `python -m benchmarks.step`. See README.md."""

from __future__ import annotations

import os

if os.environ.get("ISKD_ALLOCATOR", "tuned") != "stock":
    # before any import of iskd: that imports torch, which reads this only once
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from iskd.system.allocator import tune

tune()
