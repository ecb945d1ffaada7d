"""Runs compiled kernels on a CPU in the threads that torch's own operations use. Knows no kernel.

Numba compiles them (once a machine: they are kept beside the source, or in the user's cache) to plain functions of one
pointer, to a record of int64 numbers and addresses. They run in torch's team of OpenMP threads: a second team would
slow both (see ``runtime.threads``). The threads draw pieces of work from a counter at the record's beginning, so that
results do not depend on how many threads there are. Where there is no numba or no OpenMP, ``usable`` is false, and
callers have torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

PIECE, THREAD, FREE = range(3)
"""Columns of a record: the next piece of work, the next thread's number, and where a kernel's own begin."""

TYPES = (torch.float32, torch.bfloat16)
"""Types of numbers that kernels read and write; ``kind`` is their place."""


def usable(dtype: torch.dtype) -> bool:
    """Whether kernels for numbers of ``dtype`` run here."""
    return dtype in TYPES and _parallel() is not None


def serves(*operands: Tensor) -> bool:
    """Whether compiled kernels can read these, all of one type, and nobody asks for derivatives of the result."""
    first = operands[0]
    alike = all(each.dtype == first.dtype and each.device.type == "cpu" for each in operands)
    if not alike or not usable(first.dtype):
        return False
    return not (torch.is_grad_enabled() and any(each.requires_grad for each in operands))


def kind(operand: Tensor) -> int:
    """The number by which kernels know a type."""
    return TYPES.index(operand.dtype)


def launch(kernel: int, numbers: Sequence[int], pieces: int | None = None) -> None:
    """Run the kernel at an address in as many threads as torch would, and wait; ``numbers`` begin at ``FREE``.

    ``pieces``: of work, if the caller knows; more threads are not woken. Memory whose addresses are among the numbers
    has to live until then.
    """
    record = np.array([0, 0, *numbers], dtype=np.int64)
    parallel = _parallel()
    assert parallel is not None
    threads = torch.get_num_threads()
    parallel(kernel, record.ctypes.data, threads if pieces is None else max(1, min(threads, pieces)), 0)


@functools.cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """OpenMP's entry to a parallel region, of the library that torch is linked with; None if there is none."""
    try:
        importlib.import_module("numba")  # which looks at NumPy's version, too
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (ImportError, OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    found: Callable[[int, int, int, int], None] = function
    return found
