"""Bytes that must outlive a crash: appending, syncing in the background, atomic replacement, and clear disk errors.

Knows nothing of rows; every failure of the disk leaves what was written before intact.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from flexbatch.errors import DoesNotFitError, FlexbatchError, UsageError

SYNC_SECONDS = 2.0  # an appended row is on the disk at most this much later
_BLOCK = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def disk_error(error: OSError, path: Path, missing: int = 0) -> FlexbatchError:
    """Return the one-line error for a failed write: a full disk does not fit, all else is a matter of options."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        remedy = "free space there, or choose another disk with --output"
        message = f"cannot write {path}: {reason}: the disk lacks at least {missing} bytes: {remedy}"
        return DoesNotFitError(message, tier="disk", missing=missing, remedy=remedy)
    return UsageError(f"cannot write {path}: {reason}: choose another place, or change its permissions")


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data`` at the file's position; OSError as the system gives it, perhaps after a part of them."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where its file system can."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):  # some network file systems refuse this; the files' own bytes are safe
            os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, chunks: Iterable[bytes], size: int) -> None:
    """Write ``chunks``, ``size`` bytes in all, to ``path`` so that it appears complete or not at all.

    Raises DoesNotFitError on a full disk and UsageError on other failures; ``path`` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    written = 0
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for block in _blocks(chunks):
                write_all(fd, block)
                written += len(block)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path, max(size - written, 1)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    block = bytearray()
    for chunk in chunks:
        block += chunk
        if len(block) >= _BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)


class AppendFile:
    """An open file that only grows: each append is written at once and on the disk within ``SYNC_SECONDS``.

    A thread does the syncing, so that the last rows before a long pause are durable, too. It owns ``fd``.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self._wake = threading.Condition()
        self._dirty = False
        self.closed = False
        self._fault: OSError | None = None
        self._syncer: threading.Thread | None = None

    def truncate(self, size: int) -> None:
        """Cut the file to ``size`` bytes."""
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise disk_error(error, self.path) from None
        self.size = size

    def append(self, data: bytes) -> int:
        """Write ``data`` at the end and return its offset. On failure the file ends where it did before."""
        self._raise_fault()
        offset = self.size
        try:
            os.lseek(self.fd, offset, os.SEEK_SET)
            write_all(self.fd, data)
        except OSError as error:
            with suppress(OSError):  # a torn end is repaired when the file is next opened
                os.ftruncate(self.fd, offset)
            raise disk_error(error, self.path, len(data)) from None
        self.size += len(data)
        with self._wake:
            self._dirty = True
            if self._syncer is None:
                self._syncer = threading.Thread(target=self._sync_loop, name="journal-sync", daemon=True)
                self._syncer.start()
            self._wake.notify()
        return offset

    def sync(self) -> None:
        """Return when everything appended is on the disk."""
        with self._wake:
            self._dirty = False
        try:
            os.fsync(self.fd)
        except OSError as error:
            self._fault = error  # what failed to reach the disk once is not tried again by the kernel
        self._raise_fault()

    def close(self) -> None:
        """Sync and close; calling it again does nothing."""
        with self._wake:
            if self.closed:
                return
            self.closed = True
            self._wake.notify()
        if self._syncer is not None:
            self._syncer.join()
        try:
            self.sync()
        finally:
            os.close(self.fd)

    def _sync_loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._dirty or self.closed)
                # Appends that come soon after this one share its sync.
                self._wake.wait_for(lambda: self.closed, timeout=SYNC_SECONDS / 2)
                if self.closed:
                    return
                self._dirty = False
            started = time.monotonic()
            try:
                os.fsync(self.fd)
            except OSError as error:
                self._fault = error
                return
            # A slow disk must not be kept busy by syncs alone.
            with self._wake:
                self._wake.wait_for(lambda: self.closed, timeout=min(time.monotonic() - started, SYNC_SECONDS / 2))

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise disk_error(self._fault, self.path) from None
