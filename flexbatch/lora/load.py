"""Reads the factors of an adapter from its file to where they are to lie, widened on the way. Knows no layout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flexbatch.checkpoint.tensors import DTYPES
from flexbatch.lora.adapter import Adapter, UnreadableAdapterError
from flexbatch.lora.runs import Run

Place = Callable[[Run], Tensor]


class FactorReader:
    """Reads one adapter after the other through a buffer for the largest file's factors."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.bytes_read = 0

    def read(self, adapter: Adapter, runs: Sequence[Run], place: Place) -> None:
        """Fill what ``place`` gives for every run, [count, rank, width]: each factor a, and each b transposed.

        One call of torch a run: beside a thread that issues small products every call gives the interpreter away and
        waits to get it back. Raises UnreadableAdapterError where the file has changed since it was opened, is cut
        short, or holds a number that is not finite.
        """
        begin = min(run.first.offset for run in runs)
        end = max(run.first.offset + (run.count - 1) * run.step + run.first.nbytes for run in runs)
        if self._buffer.numel() < end - begin:
            self._buffer = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(adapter, begin, end)
        for run in runs:
            source = self._source(run, begin)
            place(run).copy_(source.transpose(1, 2) if run.turned else source)

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

    def _source(self, run: Run, begin: int) -> Tensor:
        """The factors of a run as the file has them, [count, rows, columns]."""
        dtype, (rows, columns) = DTYPES[run.first.dtype], run.first.shape
        first = run.first.offset - begin
        extent = (run.count - 1) * run.step + run.first.nbytes
        raw = self._buffer[first : first + extent]
        if first % dtype.itemsize == 0 and run.step % dtype.itemsize == 0:
            strides = (run.step // dtype.itemsize, columns, 1)
            return raw.view(dtype).as_strided((run.count, rows, columns), strides)
        whole = raw.as_strided((run.count, run.first.nbytes), (run.step, 1)).clone()  # not at whole elements
        return whole.view(dtype).view(run.count, rows, columns)


def is_finite(numbers: Tensor) -> bool:
    """Whether no number of a vector is infinite or NaN, nor the sum of some of them too large."""
    if numbers.dtype == torch.float32:  # one call of numpy, which has no threads, instead of hundreds
        with np.errstate(all="ignore"):
            return bool(np.isfinite(np.add.reduce(numbers.numpy())))
    return bool(numbers.float().sum().isfinite())
