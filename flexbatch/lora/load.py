"""Reads the factors of an adapter from its file to where they are to lie, widened on the way. Knows no layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing

from torch import Tensor

from flexbatch.checkpoint.tensors import DTYPES
from flexbatch.kernels.copies import copy_finite
from flexbatch.lora.adapter import Adapter, UnreadableAdapterError
from flexbatch.lora.runs import Run
from flexbatch.memory.aligned import BLOCK, align_down, align_up, aligned_buffer, aligned_bytes
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

        Raises UnreadableAdapterError where the file has changed since it was opened, is cut short, or has numbers that
        are not finite.
        """
        begin, nbytes = _stretch(runs)
        self._reserve(nbytes)
        self._fill(adapter, begin, nbytes, self._buffer)
        self._lay(adapter, runs, begin, place, alone=True)

    def fetch(self, adapter: Adapter, runs: Sequence[Run], room: Tensor) -> Tensor | None:
        """The first half of ``read``: only what the disk does, into a part of ``room`` (uint8), which is returned.

        None, and nothing is done, if the file's bytes do not fit into a room of this size and place.
        """
        begin, nbytes = _stretch(runs)
        first = -room.data_ptr() % BLOCK
        if first + align_up(nbytes) > room.numel():
            return None
        raw = room[first : first + align_up(nbytes)]
        self._fill(adapter, begin, nbytes, raw)
        return raw

    def spread(self, adapter: Adapter, raw: Tensor, runs: Sequence[Run], place: Place) -> None:
        """The second half, by all threads: what ``fetch`` returned goes to its place, which may be where it lies."""
        begin, nbytes = _stretch(runs)
        self._reserve(nbytes)
        self._buffer[:nbytes].copy_(raw[:nbytes])
        self._lay(adapter, runs, begin, place, alone=False)

    def _lay(self, adapter: Adapter, runs: Sequence[Run], begin: int, place: Place, *, alone: bool) -> None:
        """One call, or one a run: each that is made beside a thread of small products waits for the interpreter."""
        sources = [self._source(run, begin) for run in runs]
        turned = [own.transpose(1, 2) if run.turned else own for run, own in zip(runs, sources, strict=True)]
        if not copy_finite([place(run) for run in runs], turned, alone=alone):
            raise UnreadableAdapterError(f"adapter {adapter.file}: holds numbers that are not finite")

    def _reserve(self, nbytes: int) -> None:
        if self._buffer.numel() < nbytes:
            self._buffer = aligned_buffer(align_up(nbytes))

    def _fill(self, adapter: Adapter, begin: int, nbytes: int, room: Tensor) -> None:
        """Bring ``nbytes`` of the file from block ``begin`` on to ``room``."""
        target = aligned_bytes(room)[: align_up(nbytes)]
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


def _stretch(runs: Sequence[Run]) -> tuple[int, int]:
    """The block of the file where the factors of ``runs`` begin, and how many bytes from there on hold them all."""
    begin = align_down(min(run.first.offset for run in runs))
    return begin, max(run.first.offset + (run.count - 1) * run.step + run.first.nbytes for run in runs) - begin


def file_room(runs: Sequence[Run]) -> int:
    """Bytes that ``FactorReader.fetch`` wants, wherever they begin."""
    _, nbytes = _stretch(runs)
    return align_up(nbytes) + BLOCK
