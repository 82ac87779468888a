"""The C library's allocator: memory settings of a CPU process, set once at start-up.

Training allocates and frees hundreds of megabytes per step; by default glibc hands them back to the system each time
and gets them again page by page. Here they are kept, in huge pages; what that gains depends on the machine and is told
by `python -m benchmarks.step --ways stock`. `ISKD_ALLOCATOR=stock` switches this off.

Commands and `iskd.compress` set them when they start. glibc takes them at any time. torch asks for huge pages only if
its variable is there when it allocates first: `import iskd` sets it, before it imports torch, and nothing else. In a
notebook that has imported torch before they are left out, unless THP_MEM_ALLOC_ENABLE=1 was set by hand. They stay
until the process ends, because glibc cannot be given back the thresholds that it adapts by itself.
"""

from __future__ import annotations

import ctypes
import os
import sys

# numbers of <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 256 << 20))  # -1: never trim
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# what this process really has: stock; tuned; "tuned, no huge pages"
_state = "stock"


def ask_for_huge_pages() -> bool:
    """Have torch use huge pages for large tensors, if it is not imported yet; True when it will, as far as we know."""
    if not sys.platform.startswith("linux") or os.environ.get("ISKD_ALLOCATOR", "tuned") == "stock":
        return False
    if "torch" not in sys.modules:
        os.environ.setdefault(_HUGE_PAGES, "1")
    return os.environ.get(_HUGE_PAGES) == "1"


def tune() -> bool:
    """Apply the settings; True when glibc took them, now or before. A second call changes nothing."""
    global _state
    if _state != "stock":
        return True
    if not sys.platform.startswith("linux") or os.environ.get("ISKD_ALLOCATOR", "tuned") == "stock":
        return False
    huge = ask_for_huge_pages()
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library other than glibc
        return False
    if not all(mallopt(option, value) for option, value in _SETTINGS):
        return False
    _state = "tuned" if huge else "tuned, no huge pages"
    return True


def state() -> str:
    """What `tune` reached in this process: `stock`, `tuned`, or `tuned, no huge pages`."""
    return _state
