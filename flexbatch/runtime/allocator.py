"""The C library's allocator, told to keep what a matrix product frees. Knows nothing of who allocates."""

from __future__ import annotations

import ctypes

from flexbatch.units import MIB

KEPT = 256 * MIB
"""Freed bytes that a process may keep for its next product: more than any product of a sweep leaves."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's mallopt(3)


def keep_freed_blocks(limit: int = KEPT) -> None:
    """Keep up to ``limit`` freed bytes, at most KEPT, in the process instead of returning them to the kernel.

    The results of products are a few MB each; glibc gives such blocks back at once and faults every page in again for
    the next product, which costs up to a third of its time. Does nothing under another C library.
    """
    limit = min(limit, KEPT)
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, limit)
        library.mallopt(_TRIM_THRESHOLD, limit)
