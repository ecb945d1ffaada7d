"""Reads and writes that pass by the page cache, several at once: one open file, a throttle, and a pool of threads.

Knows blocks and requests; not what the bytes are, nor what an error means to the user.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import weakref
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from flexbatch.memory.aligned import align_down
from flexbatch.units import KIB, MIB

THREADS = 8
"""Requests in flight: two long ones fill a fast disk, short ones need more (see benchmarks/disk_read.py)."""
REQUEST_BYTES = 4 * MIB
"""The longest request."""
_MOST_VIEWS = 1024  # Linux takes no more in one call
_SMALL = 64 * KIB  # bytes of a request
_LOOK_S = 0.005  # seconds until a thread that sleeps looks up
_OVERSLEPT = 0.001  # seconds by which a sleep may end late: no idle time of a throttled disk


class BlockFile:
    """An open file, read and written in place past the page cache where its file system allows that.

    Where it does not, what was read is dropped from the cache at once. It owns ``fd``. Offsets and addresses must be
    multiples of BLOCK, and sizes, too. Every method raises OSError as the system gives it.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.direct = False
        try:
            self._set_direct(True)
        except OSError:
            self._leave_direct()

    @property
    def size(self) -> int:
        """Bytes of the file now."""
        return os.fstat(self.fd).st_size

    def read(self, views: Sequence[memoryview], offset: int, needed: int) -> int:
        """Fill ``views`` in turn from ``offset``, at least ``needed`` bytes in all, and return how many came.

        Fewer than ``needed`` come only where the file ends, or where the disk gives no more.
        """
        done = 0
        while done < needed:
            begin = align_down(done)  # after a short read: the block it ended in once more
            count = self._call(os.preadv, _after(views, begin), offset + begin)
            if begin + count <= done:
                break
            done = begin + count
        if not self.direct:
            os.posix_fadvise(self.fd, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def write(self, views: Sequence[memoryview], offset: int) -> int:
        """Write ``views`` in turn from ``offset`` on and return their length."""
        done, nbytes = 0, sum(map(len, views))
        while done < nbytes:
            count = self._call(os.pwritev, _after(views, done), offset + done)
            if done + count < nbytes:
                count = align_down(count)
            if count == 0:
                raise OSError(errno.EIO, "the disk took only a part of a block")
            done += count
        return done

    def settle(self) -> None:
        """Drop what was written from the page cache; nothing to do where it never was there."""
        if not self.direct:
            os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _call(
        self, operation: Callable[[int, list[memoryview], int], int], views: list[memoryview], offset: int
    ) -> int:
        try:
            return operation(self.fd, views, offset)
        except OSError as error:
            # Some file systems accept the flag and refuse the first request, or want larger blocks than ours.
            if error.errno != errno.EINVAL:
                raise
        self._leave_direct()
        return operation(self.fd, views, offset)

    def _leave_direct(self) -> None:
        self._set_direct(False)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead of what was asked for

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        # Off is said before it is done: what another thread moves buffered meanwhile must not pass for direct.
        self.direct = self.direct and on
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        self.direct = on


def _after(views: Sequence[memoryview], begin: int) -> list[memoryview]:
    """Return ``views`` without their first ``begin`` bytes."""
    rest = []
    for view in views:
        if begin < len(view):
            rest.append(view[begin:])
        begin = max(0, begin - len(view))
    return rest


@dataclass(frozen=True, slots=True)
class Request:
    """``nbytes`` of a file from ``offset`` to move into or out of ``views``; the file may end after ``needed``."""

    file: BlockFile
    offset: int
    views: tuple[memoryview, ...]
    nbytes: int
    needed: int


def split(file: BlockFile, offset: int, view: memoryview, needed: int, request_bytes: int) -> Iterator[Request]:
    """Yield the requests, each of at most ``request_bytes``, that together move ``view``."""
    for begin in range(0, needed, request_bytes):
        part = view[begin : begin + request_bytes]
        yield Request(file, offset + begin, (part,), len(part), min(len(part), needed - begin))


def merge(requests: Iterable[Request], request_bytes: int) -> list[Request]:
    """Return requests to whole parts of one file in its order, neighbours joined to at most ``request_bytes``."""
    groups: list[list[Request]] = []
    nbytes = 0
    for request in sorted(requests, key=lambda request: request.offset):
        group = groups[-1] if groups else []
        fits = nbytes + request.nbytes <= request_bytes and len(group) < _MOST_VIEWS
        if group and fits and group[0].offset + nbytes == request.offset:
            group.append(request)
            nbytes += request.nbytes
        else:
            groups.append([request])
            nbytes = request.nbytes
    return [_joined(group) for group in groups]


def _joined(group: Sequence[Request]) -> Request:
    nbytes = sum(request.nbytes for request in group)
    views = tuple(view for request in group for view in request.views)
    return Request(group[0].file, group[0].offset, views, nbytes, nbytes)


class Throttle:
    """Makes a disk look as slow as ``rate`` bytes/s (None: as fast as it is): all bytes of a busy spell, on average."""

    def __init__(self, rate: float | None) -> None:
        assert rate is None or rate > 0
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._small_at = 0.0

    def reserve(self, nbytes: int) -> float:
        """Return the time (of ``time.monotonic``) before which ``nbytes`` that are asked for now must not be there.

        A disk that serves many requests at a time does not let a small one wait for large ones before it.
        """
        if self._rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            if now - self._free_at > _OVERSLEPT:
                self._free_at = now
            self._free_at += nbytes / self._rate
            if nbytes > _SMALL:
                return self._free_at
            self._small_at = max(now, self._small_at) + nbytes / self._rate
            return self._small_at


class RequestPool:
    """A few threads that keep as many requests in flight; its methods may be called from several threads at once.

    Threads meet in SimpleQueues and in what one instruction does only: no lock is ever held, so an interrupt of the
    caller, wherever it strikes, leaves none taken.
    """

    def __init__(self, threads: int) -> None:
        assert threads > 0
        self._threads = threads
        self._crew = _Crew()
        # Whoever forgets to close a pool leaves no threads behind: they know the crew only.
        weakref.finalize(self, self._crew.dismiss)

    def run(self, move: Callable[[Request], int], requests: Sequence[Request], throttle: Throttle) -> int:
        """Move every request and return the sum of what ``move`` returned.

        The first error, or an interrupt of the caller, cancels what has not begun and is raised once nothing is in
        flight any more, so that the buffers are free to be used again.
        """
        spell = _Spell(move, requests, throttle)
        workers = min(self._threads, len(requests))
        if workers <= 1:
            spell.work()  # a hand-over would only add to its latency
        else:
            try:
                self._crew.give(spell, workers)
                spell.join()
            except BaseException:
                spell.cancelled = True
                spell.work()  # ends what nobody has begun
                spell.join()
                raise
        if spell.error is not None:
            raise spell.error
        return sum(spell.ended)

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._crew.dismiss()
        self._crew.join()


class _Crew:
    """Threads that work on spells; they start when there is work for them."""

    def __init__(self) -> None:
        self._spells: SimpleQueue[_Spell | None] = SimpleQueue()
        self._hired: list[None] = []
        self._gone: list[None] = []

    def give(self, spell: _Spell, workers: int) -> None:
        """Let ``workers`` threads work on ``spell``."""
        while len(self._hired) < workers:
            start_new_thread(self._serve, ())
            self._hired.append(None)
        for _ in range(workers):
            self._spells.put(spell)

    def dismiss(self) -> None:
        """Let every thread end once it has nothing to do."""
        for _ in range(len(self._hired) - len(self._gone)):
            self._spells.put(None)

    def join(self) -> None:
        """Return when they have ended."""
        while len(self._gone) < len(self._hired):
            time.sleep(_LOOK_S)
        self._hired.clear()
        self._gone.clear()

    def _serve(self) -> None:
        while (spell := self._spells.get()) is not None:
            spell.work()
            del spell  # and the buffers it knows
        self._gone.append(None)


class _Spell:
    """The requests of one call, taken one by one by whoever has time. ``ended``: bytes moved by each that is over."""

    def __init__(self, move: Callable[[Request], int], requests: Sequence[Request], throttle: Throttle) -> None:
        self.error: BaseException | None = None
        self.cancelled = False
        self.ended: list[int] = []
        self._move = move
        self._throttle = throttle
        self._count = len(requests)
        self._left = deque(requests)
        self._bell: SimpleQueue[None] = SimpleQueue()

    def work(self) -> None:
        """Move requests until none is left; once it is cancelled, end them without."""
        while True:
            try:
                request = self._left.popleft()
            except IndexError:
                return
            moved = 0
            try:
                if not self.cancelled:
                    ready = self._throttle.reserve(request.nbytes)
                    moved = self._move(request)
                    while not self.cancelled and (early := ready - time.monotonic()) > 0:
                        time.sleep(min(early, _LOOK_S))
            except BaseException as error:  # noqa: BLE001  raised again by the caller's thread
                self.error = self.error or error
                self.cancelled = True
            finally:
                self.ended.append(moved)
                self._bell.put(None)

    def join(self) -> None:
        """Return when nothing is left and nothing in flight."""
        while len(self.ended) < self._count:  # each that ends is counted first and rings afterwards
            self._bell.get()
