"""Copies many small matrices, some of them turned, and looks for numbers that are not finite on the way.

What brings LoRA factors from where a file's bytes are to where products read them. Any types and strides, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexbatch.kernels import native

_INFINITE = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # bits of infinity; those of what is no number are more


def copy_finite(targets: Sequence[Tensor], sources: Sequence[Tensor], *, alone: bool = False) -> bool:
    """Fill each target with the source [count, rows, columns] of its place: whether all numbers are finite there.

    ``alone``: no other thread may help. What a compiled kernel can copy, of equal types, is one call whose numbers are
    read once; torch and numpy need several passes.
    """
    pairs = list(zip(targets, sources, strict=True))
    finite = True
    if native.usable(torch.float32):
        from flexbatch.kernels import copies_numba  # Numba is there only where it is needed

        finite = copies_numba.copy_finite([pair for pair in pairs if copies_numba.copies(*pair)], alone=alone)
        pairs = [pair for pair in pairs if not copies_numba.copies(*pair)]
    for target, source in pairs:
        target.copy_(source)
    return finite and all(is_finite(target) for target, _ in pairs)


def is_finite(numbers: Tensor) -> bool:
    """Whether no number is infinite or NaN, nor in fp32 the sum of some of them too large. Any strides, on the CPU.

    A few calls of numpy, which has no threads, instead of hundreds.
    """
    if numbers.dtype in _INFINITE:
        bits = numbers.view(torch.int16).numpy()
        return bool(np.max(bits & 0x7FFF, initial=0) < _INFINITE[numbers.dtype])
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.add.reduce(numbers.numpy(), axis=None)))
