"""Reads the factors of an adapter from its file to where they are to lie, widened on the way. Knows no layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from flexbatch.checkpoint.tensors import DTYPES
from flexbatch.lora.adapter import Adapter, UnreadableAdapterError
from flexbatch.lora.runs import Run
from flexbatch.memory.aligned import align_down, align_up, aligned_buffer, aligned_bytes
from flexbatch.memory.blockio import BlockFile

Place = Callable[[Run], Tensor]


class FactorReader:
    """Reads one adapter after the other through a buffer for the largest file's factors.

    It passes by the page cache, whose pages cost the processor four times what the transfer does, beside the products
    that it is there for; and hardly any adapter is read twice.
    """

    def __init__(self) -> None:
        self._buffer = aligned_buffer(0)
        self.bytes_read = 0

    def read(self, adapter: Adapter, runs: Sequence[Run], place: Place) -> None:
        """Fill what ``place`` gives for every run, [count, rank, width]: each factor a, and each b transposed.

        One call of torch a run: beside a thread that issues small products every call gives the interpreter away and
        waits to get it back. Raises UnreadableAdapterError where the file has changed since it was opened, is cut
        short, or holds a number that is not finite.
        """
        begin = align_down(min(run.first.offset for run in runs))
        end = max(run.first.offset + (run.count - 1) * run.step + run.first.nbytes for run in runs)
        if self._buffer.numel() < end - begin:
            self._buffer = aligned_buffer(align_up(end - begin))
        self._fill(adapter, begin, end - begin)
        for run in runs:
            source = self._source(run, begin)
            place(run).copy_(source.transpose(1, 2) if run.turned else source)

    def _fill(self, adapter: Adapter, begin: int, nbytes: int) -> None:
        """Bring ``nbytes`` of the file from block ``begin`` on to the buffer."""
        target = aligned_bytes(self._buffer)[: align_up(nbytes)]
        try:
            with closing(BlockFile(os.open(adapter.file, os.O_RDONLY | os.O_CLOEXEC), str(adapter.file))) as file:
                if file.size != adapter.size:
                    raise UnreadableAdapterError(f"adapter {adapter.file}: the file has changed since it was opened")
                if file.read([target], begin, nbytes) < nbytes:
                    raise UnreadableAdapterError(f"adapter {adapter.file}: the file ends early: fetch it again")
        except OSError as error:
            reason = error.strerror or error
            raise UnreadableAdapterError(f"adapter {adapter.file}: cannot be read: {reason}") from error
        self.bytes_read += nbytes

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
