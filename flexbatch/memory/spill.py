"""The file that holds KV pages and hidden states on the disk tier; it vanishes with the process, however that ends.

Knows blocks of bytes; not what they hold, nor which are in use.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from flexbatch.errors import DoesNotFitError, FlexbatchError, UsageError
from flexbatch.memory.aligned import BLOCK, align_up, aligned_bytes
from flexbatch.memory.blockio import REQUEST_BYTES, THREADS, BlockFile, Request, RequestPool, Throttle, merge, split
from flexbatch.units import format_size

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS})
_PREFIX = ".flexbatch-spill-"
_REMEDY = "free space there, name another disk with --disk-dir, or lower --disk-memory"


class SpillFile:
    """``nbytes`` (rounded up to blocks) of disk in ``folder``, reserved here and now, without a name.

    Moves tensors in RAM that are contiguous, start at a block and are whole blocks long, to and from offsets that are
    multiples of BLOCK, past the page cache with ``threads`` requests in flight. ``read_rate`` and ``write_rate``
    (bytes/s) make it slower than it is. May be used from several threads at once; the order of a read and a write of
    the same bytes is the caller's concern. Raises DoesNotFitError where the disk is full, at the start or later, and
    UsageError where the folder or the disk fails.
    """

    def __init__(
        self,
        folder: Path,
        nbytes: int,
        *,
        threads: int = THREADS,
        request_bytes: int = REQUEST_BYTES,
        read_rate: float | None = None,
        write_rate: float | None = None,
    ) -> None:
        assert nbytes >= 0
        assert request_bytes > 0
        assert request_bytes % BLOCK == 0
        self.nbytes = align_up(nbytes)
        self.bytes_read = 0
        self.bytes_written = 0
        self._folder = folder
        self._request_bytes = request_bytes
        self._read_throttle = Throttle(read_rate)
        self._write_throttle = Throttle(write_rate)
        self._lock = threading.Lock()
        try:
            fd = _open_nameless(folder)
        except OSError as error:
            raise self._error(error, self.nbytes) from error
        try:
            self._reserve(fd)
            self._file = BlockFile(fd, f"{folder}: the spill file")
        except OSError as error:
            os.close(fd)
            raise self._error(error, self._shortage() or self.nbytes) from error
        self._pool = RequestPool(threads)

    @property
    def path(self) -> Path:
        """Where this process, and only it, can open the file once more, until ``close``."""
        return Path(f"/proc/self/fd/{self._file.fd}")

    def read(self, offset: int, buffer: Tensor) -> None:
        """Fill ``buffer`` with what was last written at ``offset``; zeros where nothing was."""
        self.read_many([(offset, buffer)])

    def write(self, offset: int, buffer: Tensor) -> None:
        """Write ``buffer`` at ``offset``."""
        self.write_many([(offset, buffer)])

    def read_many(self, parts: Sequence[tuple[int, Tensor]]) -> None:
        """``read`` every (offset, buffer), neighbours as one request; an error leaves the contents of all undefined."""
        count = self._pool.run(self._guarded(_fetch), self._requests(parts), self._read_throttle)
        with self._lock:
            self.bytes_read += count

    def write_many(self, parts: Sequence[tuple[int, Tensor]]) -> None:
        """``write`` every (offset, buffer), neighbours as one request; an error leaves the bytes there undefined."""
        requests = self._requests(parts)
        count = self._pool.run(self._guarded(_put), requests, self._write_throttle)
        try:
            self._file.settle()
        except OSError as error:
            raise self._error(error, count) from error
        with self._lock:
            self.bytes_written += count

    def close(self) -> None:
        """Give the disk space back and end the threads; calling it again does nothing."""
        self._pool.close()
        self._file.close()

    def _requests(self, parts: Sequence[tuple[int, Tensor]]) -> list[Request]:
        requests: list[Request] = []
        for offset, buffer in parts:
            view = aligned_bytes(buffer)
            assert offset % BLOCK == 0
            assert len(view) % BLOCK == 0, "the spill file holds whole blocks"
            assert 0 <= offset <= self.nbytes - len(view), "outside of the spill file"
            requests += split(self._file, offset, view, len(view), self._request_bytes)
        return merge(requests, self._request_bytes)

    def _guarded(self, move: Callable[[Request], int]) -> Callable[[Request], int]:
        """Return ``move`` with the system's errors turned into the user's."""

        def guarded(request: Request) -> int:
            try:
                return move(request)
            except OSError as error:
                raise self._error(error, request.nbytes, f" at byte {request.offset}") from error

        return guarded

    def _error(self, error: OSError, missing: int, where: str = "") -> FlexbatchError:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            message = (
                f"the disk tier does not fit into {self._folder}: {reason}: of {format_size(self.nbytes)} "
                f"at least {missing} bytes are missing: {_REMEDY}"
            )
            return DoesNotFitError(message, tier="disk", missing=missing, remedy=_REMEDY)
        return UsageError(f"{self._folder}: the spill file failed{where}: {reason}: name another disk with --disk-dir")

    def _reserve(self, fd: int) -> None:
        if self._shortage():
            # Trying would fill the disk for a moment, at the cost of whoever else writes there.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.nbytes:
            # Before direct I/O begins: where the C library must write the blocks itself, it does so byte by byte.
            os.posix_fallocate(fd, 0, self.nbytes)

    def _shortage(self) -> int:
        """How many bytes more than are free this file takes; 0 where it is a matter of quotas or limits, if at all."""
        disk = os.statvfs(self._folder)
        return max(0, self.nbytes - disk.f_bavail * disk.f_frsize) if disk.f_blocks else 0


def _fetch(request: Request) -> int:
    count = request.file.read(request.views, request.offset, request.needed)
    if count < request.needed:
        raise OSError(errno.EIO, f"the disk gave {count} of {request.needed} bytes")
    return count


def _put(request: Request) -> int:
    return request.file.write(request.views, request.offset)


def _open_nameless(folder: Path) -> int:
    """Return a new file in ``folder`` that no name leads to."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    # A name that another run left is of no use to anybody, for each is taken away as soon as it is made.
    for left in folder.glob(f"{_PREFIX}*"):
        left.unlink(missing_ok=True)
    path = folder / f"{_PREFIX}{secrets.token_hex(8)}"
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink(missing_ok=True)
    return fd
