"""Runs of bytes in one arena: first fit, lowest address first. Pure; knows no bytes and no owners."""

from __future__ import annotations

from bisect import bisect_left, insort

from flexbatch.errors import InternalError


class Extents:
    """Free and taken runs of ``capacity`` bytes. Neighbouring free runs are always one."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (start, length), rising
        self._taken: dict[int, int] = {}

    @property
    def largest(self) -> int:
        """The longest run that could be taken now."""
        return max((length for _, length in self._free), default=0)

    @property
    def fragmentation(self) -> float:
        """The share of the free bytes that lies outside of the longest free run."""
        free = self.capacity - self.used
        return 1 - self.largest / free if free else 0.0

    def take(self, length: int) -> int | None:
        """Return the start of a free run of ``length`` bytes, now taken, or None."""
        for place, (start, room) in enumerate(self._free):
            if room >= length:
                if room > length:
                    self._free[place] = (start + length, room - length)
                else:
                    del self._free[place]
                self._taken[start] = length
                self.used += length
                return start
        return None

    def give(self, start: int) -> None:
        """Free the run that was taken at ``start``."""
        if start not in self._taken:
            raise InternalError(f"the run at {start} is freed but not taken")
        length = self._taken.pop(start)
        self.used -= length
        place = bisect_left(self._free, (start, 0))
        if place < len(self._free) and self._free[place][0] == start + length:
            length += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == start:
            before, room = self._free.pop(place - 1)
            start, length = before, room + length
        insort(self._free, (start, length))
