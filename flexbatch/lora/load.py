"""Reads the factors of an adapter from its file to where they are to lie, widened on the way. Knows no layout."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexbatch.checkpoint.tensors import DTYPES
from flexbatch.lora.adapter import Adapter, AdapterPart, Factor, UnreadableAdapterError

Place = Callable[[AdapterPart], tuple[Tensor, Tensor]]


class FactorReader:
    """Reads one adapter after the other through buffers for the largest file's factors: as they are, and in fp32."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._wide = torch.empty(0, dtype=torch.float32)
        self.bytes_read = 0

    def read(self, adapter: Adapter, place: Place) -> None:
        """Fill a [rank, in] and b transposed [rank, out] of every part, which ``place`` gives.

        Raises UnreadableAdapterError where the file has changed since it was opened, is cut short, or holds a number
        that is not finite.
        """
        factors = [factor for part in adapter.parts for factor in (part.a, part.b)]
        begin = min(factor.offset for factor in factors)
        end = max(factor.offset + factor.nbytes for factor in factors)
        if self._buffer.numel() < end - begin:
            self._buffer = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(adapter, begin, end)
        whole = self._widened(factors, begin, end)
        for part in adapter.parts:
            a, b = place(part)
            for target, factor, turned in ((a, part.a, False), (b, part.b, True)):
                if target.dtype == torch.float32 and whole is not None:
                    first = (factor.offset - begin) // DTYPES[factor.dtype].itemsize
                    numbers = whole[first : first + math.prod(factor.shape)].reshape(factor.shape)
                    np.copyto(target.numpy(), numbers.T if turned else numbers)
                else:
                    source = self._view(factor, begin)
                    target.copy_(source.t() if turned else source)

    @staticmethod
    def announce(adapter: Adapter) -> None:
        """Let the system begin to read a file that ``read`` is for soon; whatever is wrong with it is said then.

        Left to itself, a disk that is asked for one piece of one file at a time gives a fraction of its rate.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):
            descriptor = os.open(adapter.file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, adapter.size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def _fill(self, adapter: Adapter, begin: int, end: int) -> None:
        target = self._buffer.numpy().data
        done = 0
        try:
            descriptor = os.open(adapter.file, os.O_RDONLY)
            try:
                if os.fstat(descriptor).st_size != adapter.size:
                    raise UnreadableAdapterError(f"adapter {adapter.file}: the file has changed since it was opened")
                while done < end - begin:
                    count = os.preadv(descriptor, [target[done : end - begin]], begin + done)
                    if count == 0:
                        raise UnreadableAdapterError(f"adapter {adapter.file}: the file ends early: fetch it again")
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            reason = error.strerror or error
            raise UnreadableAdapterError(f"adapter {adapter.file}: cannot be read: {reason}") from error
        self.bytes_read += done

    def _widened(self, factors: Sequence[Factor], begin: int, end: int) -> NDArray[np.float32] | None:
        """What was read, in fp32 and at once; None where it is of several types, or not at whole numbers.

        One call for all of it, and then numpy's for each factor: beside a thread that issues small products every call
        of torch gives the interpreter away and waits to get it back.
        """
        kinds = {factor.dtype for factor in factors}
        dtype = DTYPES[kinds.pop()]
        if kinds or any((factor.offset - begin) % dtype.itemsize for factor in factors):
            return None
        numbers = self._buffer[: (end - begin) // dtype.itemsize * dtype.itemsize].view(dtype)
        if dtype == torch.float32:
            return numbers.numpy()
        if self._wide.numel() < numbers.numel():
            self._wide = torch.empty(numbers.numel(), dtype=torch.float32)
        return self._wide[: numbers.numel()].copy_(numbers).numpy()

    def _view(self, factor: Factor, begin: int) -> Tensor:
        raw = self._buffer[factor.offset - begin : factor.offset - begin + factor.nbytes]
        dtype = DTYPES[factor.dtype]
        if (factor.offset - begin) % dtype.itemsize:
            raw = raw.clone()  # a file whose tensors do not lie at whole elements
        return raw.view(dtype).view(factor.shape)


def is_finite(numbers: Tensor) -> bool:
    """Whether no number of a vector is infinite or NaN, nor the sum of some of them too large."""
    if numbers.dtype == torch.float32:  # one call of numpy, which has no threads, instead of hundreds
        with np.errstate(all="ignore"):
            return bool(np.isfinite(np.add.reduce(numbers.numpy())))
    return bool(numbers.float().sum().isfinite())
