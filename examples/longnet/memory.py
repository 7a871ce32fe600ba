"""Keeps freed memory in the process, so that every step does not fault its pages in again.

glibc gives blocks above 32 MiB back to the system at each free; activations of 16k tokens are about
that large, and their pages would be zeroed anew in every step. For programs only: it acts on the
whole process, so the library never calls it on its own.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Serves every allocation from the heap and never shrinks it; whether the C library can."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
