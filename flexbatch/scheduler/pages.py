"""The page allocator: which pages of one tier's pool are free, and how many hold each one. Pure; knows no bytes.

A page is a fixed number of tokens of every layer. Pages of one sequence are placed side by side when that is
possible, because attention reads a run of pages without copying it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flexbatch.errors import InternalError

_FREE, _RESERVED, _USED = 0, 1, 2


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence, in order, and the run kept free behind them for its growth.

    ``borrowed``: how many of the first ones were others' when they were taken.
    """

    pages: list[int] = field(default_factory=list)
    reserved_end: int = 0
    borrowed: int = 0


class PageAllocator:
    """Reference-counted pages ``0 .. capacity - 1``; ``peak`` is the most that were held at a time.

    Reservations are soft: they steer other sequences elsewhere while there is room elsewhere, and give way when there
    is none. So no page is ever unusable.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise InternalError(f"a pool of {capacity} pages")
        self._state = bytearray(capacity)
        self._holders = [0] * capacity
        self._used = 0
        self.peak = 0

    @property
    def capacity(self) -> int:
        """Pages in the pool."""
        return len(self._state)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self._used

    @property
    def available(self) -> int:
        """Pages that nobody holds, reserved ones included."""
        return len(self._state) - self._used

    def grow(self, table: PageTable, pages: int, expected: int) -> bool:
        """Extend ``table`` to ``pages`` pages; False, and nothing changed, if the pool has too few.

        ``expected`` is how many it will probably need in the end, itself included.
        """
        missing = pages - len(table.pages)
        if missing <= 0:
            return True
        if missing > self.available:
            return False
        if len(table.pages) == table.borrowed:
            self._reserve(table, max(expected, pages) - table.borrowed)
        while len(table.pages) < pages:
            self._take(table)
        return True

    def share(self, table: PageTable, pages: Sequence[int]) -> None:
        """Append ``pages``, which somebody else holds, to ``table``, before any of its own: one holder more each."""
        for page in pages:
            if self._state[page] != _USED:
                raise InternalError(f"page {page} is shared but not in use")
            self._holders[page] += 1
            table.pages.append(page)
        table.borrowed += len(pages)
        if table.borrowed != len(table.pages):
            raise InternalError("pages of others come behind some of its own")

    def release(self, table: PageTable) -> None:
        """Give back every page of ``table`` and its reservation."""
        for page in table.pages:
            if self._holders[page] <= 0:
                raise InternalError(f"page {page} is released twice")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._state[page] = _FREE
                self._used -= 1
        if table.reserved_end:
            for page in range(table.pages[-1] + 1, table.reserved_end):
                if self._state[page] == _RESERVED:
                    self._state[page] = _FREE
        table.pages.clear()
        table.reserved_end = 0
        table.borrowed = 0

    def check_idle(self) -> None:
        """Raise InternalError if any page is still held or reserved: the ledger of a run that is over."""
        if self._used or any(self._state):
            raise InternalError(f"{self._used} pages are still held after the last sequence")

    def _reserve(self, table: PageTable, count: int) -> None:
        start = self._state.find(bytes(count))
        if start < 0:
            return
        self._state[start : start + count] = bytes([_RESERVED]) * count
        self._place(table, start)
        table.reserved_end = start + count

    def _take(self, table: PageTable) -> None:
        if len(table.pages) > table.borrowed:
            following = table.pages[-1] + 1
            if following < table.reserved_end and self._state[following] == _RESERVED:
                self._place(table, following)
                return
            self._abandon(table)
            if following < len(self._state) and self._state[following] == _FREE:
                self._place(table, following)
                return
        page = self._state.find(_FREE)
        if page < 0:
            page = self._state.rfind(_RESERVED)
        self._place(table, page)

    def _abandon(self, table: PageTable) -> None:
        """Drop what is left of a reservation that somebody broke into."""
        for page in range(table.pages[-1] + 1, table.reserved_end):
            if self._state[page] == _RESERVED:
                self._state[page] = _FREE
        table.reserved_end = 0

    def _place(self, table: PageTable, page: int) -> None:
        self._state[page] = _USED
        self._holders[page] = 1
        self._used += 1
        self.peak = max(self.peak, self._used)
        table.pages.append(page)
