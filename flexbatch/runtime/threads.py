"""Threads beside the one that issues products. Knows torch only.

Whoever runs a parallel piece of torch gets a team of OpenMP threads that stays with the thread it was made for. With a
second team there are more of them than processors, and OpenMP no longer waits actively: every small product of the
first one then begins with a system call, which takes a decoding sweep up to half as long again.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch


def keep_to_one_core() -> None:
    """Let torch's operations that the calling thread issues stay in it from now on; other threads keep theirs.

    Where torch is built without OpenMP it does nothing.
    """
    torch.get_num_threads()  # where torch looks at a thread for the first time, it sets the numbers anew
    for setter in _setters():
        setter(1)


@functools.cache
def _setters() -> list[Callable[[int], None]]:
    """OpenMP's and MKL's functions for the calling thread's number, of the libraries that torch is linked with."""
    found = []
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        try:
            setter = getattr(ctypes.CDLL(torch._C.__file__), name)
        except (OSError, AttributeError):
            continue
        setter.argtypes = [ctypes.c_int]
        found.append(setter)
    return found
