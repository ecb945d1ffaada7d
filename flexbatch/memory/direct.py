"""Reading byte ranges of checkpoints straight from disk: direct, coalesced, several requests at once.

Knows files and ranges of bytes; not which tensors they are, nor when they are needed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexbatch.errors import ModelError
from flexbatch.memory.aligned import BLOCK, align_down, align_up, aligned_buffer, aligned_bytes
from flexbatch.memory.blockio import REQUEST_BYTES, THREADS, BlockFile, Request, RequestPool, Throttle, split
from flexbatch.units import KIB, MIB

GAP = 128 * KIB
"""Two ranges at most this far apart are read as one: the bytes between cost less than another request."""
_ROW_THREADS = 32  # requests for rows in flight: they are short
_STAGING = 16 * MIB  # the most that a look-up of rows holds beside its result


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of a file, neither of them aligned."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReadRange:
    """Whole blocks ``start`` to ``start + nbytes`` of a file, for byte ``position`` of the buffer.

    The first ``needed`` bytes hold extents; the file may end after them.
    """

    path: Path
    start: int
    nbytes: int
    needed: int
    position: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What to read for ``extents``: ``ranges``, by file and place, end to end in a buffer of ``nbytes``.

    ``offsets[i]`` is where the bytes of ``extents[i]`` will stand in the buffer. It equals the extent's own offset
    modulo BLOCK, so a tensor that is misaligned in its file is just as misaligned in memory.
    """

    extents: tuple[Extent, ...]
    offsets: tuple[int, ...]
    ranges: tuple[ReadRange, ...]
    nbytes: int

    def view(self, buffer: Tensor, index: int, offset: int = 0) -> Tensor:
        """The bytes of ``extents[index]``, uint8 [nbytes], in a buffer that the plan was read into at ``offset``."""
        start = offset + self.offsets[index]
        return buffer[start : start + self.extents[index].nbytes]


def plan_reads(extents: Sequence[Extent], gap: int = GAP) -> ReadPlan:
    """Return how to read ``extents`` in as few ranges of whole blocks as pay; they may overlap and come in any order.

    Ranges at most ``gap`` bytes apart become one, and what lies between them takes room in the buffer, too.
    """
    offsets = [0] * len(extents)
    ranges: list[ReadRange] = []
    position = 0
    for index in sorted(range(len(extents)), key=lambda index: (str(extents[index].path), extents[index].offset)):
        extent = extents[index]
        if extent.nbytes == 0:
            continue
        start, end = align_down(extent.offset), extent.offset + extent.nbytes
        last = ranges[-1] if ranges else None
        if last is not None and last.path == extent.path and start <= last.start + last.nbytes + gap:
            start, end = last.start, max(end, last.start + last.needed)
            position = last.position
            ranges.pop()
        ranges.append(ReadRange(extent.path, start, align_up(end) - start, end - start, position))
        offsets[index] = position + extent.offset - start
        position += ranges[-1].nbytes
    return ReadPlan(tuple(extents), tuple(offsets), tuple(ranges), position)


class DirectReader:
    """Reads files, each opened once, past the page cache with ``threads`` requests in flight.

    ``rate`` (bytes/s) makes it slower than it is. Its methods may be called from several threads at once. They raise
    ModelError, naming file and byte, where a file cannot be read or ends too early.
    """

    def __init__(
        self, *, threads: int = THREADS, request_bytes: int = REQUEST_BYTES, rate: float | None = None
    ) -> None:
        assert request_bytes > 0
        assert request_bytes % BLOCK == 0
        self.bytes_read = 0
        self._request_bytes = request_bytes
        self._pool = RequestPool(threads)
        self._rows_pool = RequestPool(_ROW_THREADS)  # rows of a table do not wait behind layers of weights
        self._throttle = Throttle(rate)
        self._lock = threading.Lock()
        self._files: dict[Path, BlockFile] = {}

    def read(self, plan: ReadPlan, buffer: Tensor, offset: int = 0) -> int:
        """Read all of ``plan`` into ``buffer`` (uint8 in RAM) from ``offset`` and return how many bytes came.

        The place must start at a block; it takes ``plan.nbytes``. After an error its contents are undefined.
        """
        return self._read(plan, buffer[offset : offset + plan.nbytes], self._pool)

    def _read(self, plan: ReadPlan, place: Tensor, pool: RequestPool) -> int:
        assert place.dtype == torch.uint8
        assert len(place) == plan.nbytes, "the buffer is too small for the plan"
        view = aligned_bytes(place)
        requests: list[Request] = []
        for part in plan.ranges:
            target = view[part.position : part.position + part.nbytes]
            requests += split(self._open(part.path), part.start, target, part.needed, self._request_bytes)
        count = pool.run(_fetch, requests, self._throttle)
        with self._lock:
            self.bytes_read += count
        return count

    def read_rows(self, path: Path, base: int, row_bytes: int, rows: Sequence[int]) -> Tensor:
        """Return rows of a table that begins at byte ``base`` of a file, uint8 [len(rows), row_bytes].

        A row that is named twice is read once. Takes at most 16 MiB (or one row) beside the result.
        """
        result = torch.empty((len(rows), row_bytes), dtype=torch.uint8)
        if result.numel() == 0:
            return result
        unique, inverse = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        assert unique[0] >= 0
        order = np.argsort(inverse, kind="stable")
        ordered = inverse[order]
        at_once = max(1, _STAGING // (align_up(row_bytes) + BLOCK))
        staging = aligned_buffer(min(at_once, len(unique)) * (align_up(row_bytes) + BLOCK))
        windows = np.lib.stride_tricks.sliding_window_view(staging.numpy(), row_bytes)  # a row from every byte on
        for first in range(0, len(unique), at_once):
            part = unique[first : first + at_once].tolist()
            plan = plan_reads([Extent(path, base + row * row_bytes, row_bytes) for row in part], gap=0)
            self._read(plan, staging[: plan.nbytes], self._rows_pool)
            begin, end = np.searchsorted(ordered, (first, first + len(part)))
            result.numpy()[order[begin:end]] = windows[np.asarray(plan.offsets)[ordered[begin:end] - first]]
        return result

    def close(self) -> None:
        """Close the files and end the threads; calling it again does nothing."""
        self._pool.close()
        self._rows_pool.close()
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _open(self, path: Path) -> BlockFile:
        with self._lock:
            if path not in self._files:
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
                self._files[path] = BlockFile(fd, str(path))
            return self._files[path]


def _fetch(request: Request) -> int:
    file, needed = request.file, request.needed
    try:
        count = file.read(request.views, request.offset, needed)
        if count >= needed:
            return count
        size = file.size
    except OSError as error:
        raise ModelError(
            f"{file.name}: cannot be read at byte {request.offset}: {error.strerror or error}; "
            "check the disk, or fetch the file again"
        ) from error
    end = request.offset + count
    if size > end:
        raise ModelError(f"{file.name}: cannot be read at byte {end}: the disk gives no more; check the disk")
    raise ModelError(
        f"{file.name}: the file ends after {end} bytes, but its tensors need {request.offset + needed}; "
        "it changed or was truncated: fetch it again"
    )
