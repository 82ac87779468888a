"""Memory settings of a CPU process, set once at start-up.

Training allocates and frees hundreds of megabytes per step; by default glibc hands them back to the system each time
and gets them again page by page. Keeping them, in huge pages, made the same training step 1.3 to 2.2 times faster on
two cores. `ISKD_ALLOCATOR=stock` switches this off.
"""

from __future__ import annotations

import ctypes
import os
import sys

# numbers of <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune() -> bool:
    """Apply the settings; True when they took effect. Call before torch is imported: it reads its variable once."""
    if not sys.platform.startswith("linux") or os.environ.get("ISKD_ALLOCATOR", "tuned") == "stock":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library other than glibc
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 256 << 20))  # -1: never trim
    return all(mallopt(option, value) for option, value in settings)
