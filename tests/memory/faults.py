"""File systems and disks that refuse, for tests: what the system calls would answer, at the level of ``os``."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable

import pytest

Transfer = Callable[[int, list[memoryview], int], int]


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file may be put into direct mode."""
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


def refuse_direct_transfers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Direct mode may be set, but a transfer in it is refused, as file systems with larger blocks do."""
    real: Transfer = getattr(os, name)

    def refuse(fd: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, views, offset)

    monkeypatch.setattr(os, name, refuse)


def record_dropped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that will hold the (offset, length) of every range that is dropped from the page cache."""
    dropped: list[tuple[int, int]] = []
    real = os.posix_fadvise

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((offset, length))
        real(fd, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return dropped


class Faulty:
    """Stands in for ``os.preadv`` or ``os.pwritev``: counts calls, fails at one offset, knows what is in flight."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *, at: int = -1, code: int = errno.EIO) -> None:
        self.real: Transfer = getattr(os, name)
        self.calls = 0
        self.in_flight = 0
        self._at = at
        self._code = code
        self._lock = threading.Lock()
        monkeypatch.setattr(os, name, self)

    def before(self, offset: int) -> None:
        """What happens first; other tests' faults replace it."""

    def __call__(self, fd: int, views: list[memoryview], offset: int) -> int:
        with self._lock:
            self.calls += 1
            self.in_flight += 1
        try:
            self.before(offset)
            if offset == self._at:
                raise OSError(self._code, os.strerror(self._code))
            return self.real(fd, views, offset)
        finally:
            with self._lock:
                self.in_flight -= 1
