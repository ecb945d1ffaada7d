"""Memory and numbers in whole disk blocks, as direct I/O wants them. Knows nothing of files."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096
"""Bytes of a block: direct I/O wants offsets, sizes and addresses to be multiples of it. Also a page of memory."""
_LARGE = 2 << 20  # from here on huge pages are asked for: fewer faults at first touch, fewer misses of the TLB


def align_down(number: int) -> int:
    """Return the largest multiple of BLOCK that is not above ``number``."""
    return number // BLOCK * BLOCK


def align_up(number: int) -> int:
    """Return the smallest multiple of BLOCK that is not below ``number``."""
    return -(-number // BLOCK) * BLOCK


def aligned_buffer(nbytes: int) -> Tensor:
    """Return zeros, uint8 [nbytes], that start at a block; the kernel provides the memory when it is first touched."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    # Private: shared anonymous memory would count as page cache.
    raw = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            raw.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8))


def aligned_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in RAM that starts at a block, to be read or written in place."""
    assert tensor.is_contiguous(), "direct I/O wants one run of bytes"
    if tensor.numel() == 0:
        return memoryview(b"")
    assert tensor.data_ptr() % BLOCK == 0, "direct I/O wants memory that starts at a block"
    return tensor.reshape(-1).view(torch.uint8).numpy().data
