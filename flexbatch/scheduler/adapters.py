"""Which adapters are in RAM and which in pages of the pool they share with KV: LRU, pinned while in use. Pure.

Where products run on a CPU the arena in RAM is all there is; on a GPU an adapter in use also has pages, the same ids in
every layer, from the allocator that sequences take theirs from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from flexbatch.errors import InternalError
from flexbatch.scheduler.extents import Extents
from flexbatch.scheduler.pages import PageAllocator, PageTable


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """Bytes of the arena, and pages of the pool (of every layer; 0 where the arena is the pool)."""

    nbytes: int
    pages: int = 0


@dataclass(frozen=True, slots=True)
class AdapterMoves:
    """What a sweep moves: ``reads`` from disk to the arena, ``uploads`` from there to their pages.

    ``fetches`` are reads for sequences that will be admitted next: this sweep does not wait for them. ``clears``:
    pages that adapters gave up and whose bytes must not be taken for KV.
    """

    reads: tuple[str, ...] = ()
    fetches: tuple[str, ...] = ()
    uploads: tuple[str, ...] = ()
    clears: tuple[int, ...] = ()


NO_MOVES = AdapterMoves()


@dataclass(slots=True)
class AdapterCounts:
    """What a run's adapters cost so far. ``waits``: admissions put off for want of room."""

    reads: int = 0
    uploads: int = 0
    evictions: int = 0
    waits: int = 0


class AdapterCache:
    """Adapters of the given ``sizes`` in an arena of ``arena`` bytes and, on a GPU, in pages of ``pool``.

    An adapter stays where it is when nobody uses it any more, until its room is needed: the one that was used least
    recently goes first. What is in use never moves.

    Adapters that are ``expected`` together, and for which there is room, have their places from then on; nothing is
    read before it is used or fetched.
    """

    def __init__(self, sizes: Mapping[str, AdapterSize], arena: int, pool: PageAllocator | None = None) -> None:
        self._sizes = sizes
        self._extents = Extents(arena)
        self._pool = pool
        self._starts: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._tables: OrderedDict[str, PageTable] = OrderedDict()
        self._users: dict[str, int] = {}
        self._busy: set[str] = set()  # in the arena, being uploaded
        self._unread: set[str] = set()  # in their places, but not yet read
        self._reads: list[str] = []
        self._fetches: list[str] = []
        self._uploads: list[str] = []
        self._cleared: set[int] = set()
        self.counts = AdapterCounts()
        self.peak = 0

    @property
    def pinned_pages(self) -> int:
        """Pages of adapters in use."""
        return sum(len(table.pages) for name, table in self._tables.items() if name in self._users)

    @property
    def capacity(self) -> int:
        """Bytes of the arena."""
        return self._extents.capacity

    @property
    def fragmentation(self) -> float:
        """The share of the arena's free bytes that lies outside of its longest free run."""
        return self._extents.fragmentation

    def pages_of(self, name: str | None) -> int:
        """Pages of the pool that an adapter takes; 0 for the base model."""
        return 0 if name is None else self._sizes[name].pages

    def is_pinned(self, name: str | None) -> bool:
        """Whether using ``name`` costs no room: it is in use already, or the base model."""
        return name is None or name in self._users

    def fits(self, name: str) -> bool:
        """Whether an empty arena and an empty pool have room for it."""
        size = self._sizes[name]
        return size.nbytes <= self._extents.capacity and (self._pool is None or size.pages <= self._pool.capacity)

    def swaps(self, name: str | None) -> bool:
        """Whether using ``name`` now would push another adapter out."""
        if name is None or name in self._users:
            return False
        size = self._sizes[name]
        if self._pool is not None:
            if name in self._tables:
                return False
            if size.pages > self._pool.available:
                return True
        return name not in self._starts and size.nbytes > self._extents.largest

    def acquire(self, name: str) -> bool:
        """Use an adapter once more: True when it is in its place, or on its way; False if others take all the room."""
        if name not in self._users:
            if self._pool is not None and name not in self._tables and not self._page_in(name, self._pool):
                self.counts.waits += 1
                return False
            if self._pool is None and not self._place(name, self._reads, ()):
                self.counts.waits += 1
                return False
        self._users[name] = self._users.get(name, 0) + 1
        for order in (self._starts, self._tables):
            if name in order:
                order.move_to_end(name)
        return True

    def release(self, name: str) -> None:
        """One use less."""
        if name not in self._users:
            raise InternalError(f"adapter {name} is released but not in use")
        self._users[name] -= 1
        if self._users[name] == 0:
            del self._users[name]

    def reclaim(self) -> bool:
        """Give back the pages of the adapter that nobody has used for longest; False if all are in use."""
        name = next((name for name in self._tables if name not in self._users), None)
        if name is None:
            return False
        self._page_out(name)
        return True

    def expect(self, names: Collection[str]) -> None:
        """A run with adapters ``names`` begins, and nothing is in use: give all of them places, if all fit together.

        Those of earlier runs go as far as they have to. Where free room lies in pieces that are too short, everything
        goes: what is read again costs less than rows that wait until the rows of other adapters are done.
        """
        for name in self._unread:
            self._extents.give(self._starts.pop(name))
        self._unread.clear()
        wanted = set(names)
        if sum(self._sizes[name].nbytes for name in wanted) > self._extents.capacity or wanted <= self._starts.keys():
            return
        if not self._place_all(wanted):
            for name in list(self._starts):
                self._evict(name)
            if not self._place_all(wanted):
                raise InternalError("adapters that fit an arena together do not fit it one behind the other")

    def fetch(self, names: Iterable[str]) -> None:
        """Read adapters that will be used soon, as far as room can be had from those that will not."""
        wanted = list(dict.fromkeys(name for name in names if name not in self._tables))
        for name in wanted:
            if not self._place(name, self._fetches, wanted):
                return

    def take_moves(self) -> AdapterMoves:
        """What has to move for the sweep that is being made; asked once a sweep."""
        held = {page for table in self._tables.values() for page in table.pages}
        moves = AdapterMoves(
            tuple(self._reads), tuple(self._fetches), tuple(self._uploads), tuple(sorted(self._cleared - held))
        )
        self.counts.reads += len(moves.reads) + len(moves.fetches)
        self.counts.uploads += len(moves.uploads)
        self._reads, self._fetches, self._uploads = [], [], []
        self._cleared = set()
        return moves

    def computed(self) -> None:
        """The sweep is over: what it uploaded has arrived."""
        self._busy.clear()

    def start(self, name: str) -> int:
        """Where an adapter begins in the arena, in bytes."""
        return self._starts[name]

    def pages(self, name: str) -> list[int]:
        """The pages of an adapter, in order."""
        return self._tables[name].pages

    def drop(self, name: str) -> None:
        """Forget an adapter that could not be read and that nobody uses any more."""
        if name in self._tables and name not in self._users:
            self._page_out(name)
        if name in self._starts and name not in self._users:
            self._unread.discard(name)
            self._extents.give(self._starts.pop(name))

    def check_idle(self) -> None:
        """Raise InternalError if any adapter is still in use: the ledger of a run that is over."""
        if self._users:
            raise InternalError(f"{len(self._users)} adapters are still in use after the last sequence")

    def clear(self) -> None:
        """Give everything back; InternalError if something is still in use."""
        self.check_idle()
        while self.reclaim():
            pass
        for start in self._starts.values():
            self._extents.give(start)
        self._starts.clear()
        self._unread.clear()

    # --- room ----------------------------------------------------------------------------------------------------

    def _place(self, name: str, queue: list[str], spare: Collection[str]) -> bool:
        """Find room in the arena for what has to be read; those in ``spare`` do not make way for it."""
        if name in self._starts:
            if name in self._unread:
                self._unread.remove(name)
                queue.append(name)
            return True
        length = self._sizes[name].nbytes
        idle = [other for other in self._starts if not self._arena_pinned(other) and other not in spare]
        if length > self._extents.capacity - self._extents.used + sum(self._sizes[other].nbytes for other in idle):
            return False
        start = self._extents.take(length)
        for other in idle:
            if start is not None:
                break
            self._evict(other)
            start = self._extents.take(length)
        if start is None:
            return False
        self._settle(name, start)
        queue.append(name)
        return True

    def _place_all(self, wanted: AbstractSet[str]) -> bool:
        """Find room for all of them, the largest first, at the cost of others; some may have it if not all can."""
        missing = sorted(wanted - self._starts.keys(), key=lambda name: (-self._sizes[name].nbytes, name))
        others = [name for name in self._starts if name not in wanted]
        for name in missing:
            start = self._extents.take(self._sizes[name].nbytes)
            while start is None and others:
                self._evict(others.pop(0))
                start = self._extents.take(self._sizes[name].nbytes)
            if start is None:
                return False
            self._settle(name, start)
            self._unread.add(name)
        return True

    def _settle(self, name: str, start: int) -> None:
        self._starts[name] = start
        self.peak = max(self.peak, self._extents.used)

    def _arena_pinned(self, name: str) -> bool:
        return name in self._busy or (self._pool is None and name in self._users)

    def _evict(self, name: str) -> None:
        self._extents.give(self._starts.pop(name))
        if name in self._unread:
            self._unread.remove(name)
            return
        self.counts.evictions += 1
        for queue in (self._reads, self._fetches):
            if name in queue:
                queue.remove(name)

    def _page_in(self, name: str, pool: PageAllocator) -> bool:
        table = PageTable()
        pages = self._sizes[name].pages
        idle = sum(len(other.pages) for key, other in self._tables.items() if key not in self._users)
        if pages > pool.available + idle:
            return False
        while not pool.grow(table, pages, pages):
            self.reclaim()
        self._tables[name] = table
        if not self._place(name, self._reads, ()):
            pool.release(self._tables.pop(name))
            return False
        self._busy.add(name)
        self._uploads.append(name)
        return True

    def _page_out(self, name: str) -> None:
        assert self._pool is not None
        table = self._tables.pop(name)
        self._cleared.update(table.pages)
        self._pool.release(table)
        self.counts.evictions += 1
        if name in self._uploads:
            self._uploads.remove(name)
            self._busy.discard(name)
