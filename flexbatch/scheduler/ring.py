"""A buffer through which groups of weights pass in a fixed cyclic order. Pure.

Knows sizes and the ids of Steps; neither what is in the bytes nor who moves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Piece:
    """Bytes ``start .. end - 1`` of a ring: filled by step ``ready``, free after ``users`` (None: in use)."""

    start: int
    end: int
    ready: int = -1
    users: tuple[int, ...] | None = None

    def touches(self, other: Piece) -> bool:
        """Whether the two have a byte in common."""
        return self.start < other.end and other.start < self.end


class Ring:
    """Groups that pass in a fixed cyclic order through one buffer of ``capacity`` bytes, each in one piece.

    ``sizes``: their bytes. A group takes the place that was used longest ago, and leaves room for the next one beside
    it: so the largest may be read while the one before it is still in use, if the buffer holds both.
    """

    def __init__(self, sizes: Mapping[int, int], capacity: int) -> None:
        assert all(nbytes <= capacity for nbytes in sizes.values()), "a ring is smaller than a group"
        self.groups = tuple(sizes)
        self.next = 0
        self.rounds = 0
        self.ready: dict[int, Piece] = {}
        self._sizes = sizes
        self._capacity = capacity
        self._pieces: list[Piece] = []  # what was put where last, oldest first

    def take(self, rounds: int) -> tuple[int, Piece, tuple[int, ...]] | None:
        """The next group, its place, and the ids after which that is free.

        None while something there is in use, or if ``rounds`` rounds are complete.
        """
        if not self.groups or self.rounds == rounds:
            return None
        group = self.groups[self.next]
        if group in self.ready:
            return None  # a whole round ahead
        following = (self.next + 1) % len(self.groups)
        place = self._best(self._sizes[group], self._sizes[self.groups[following]])
        touched = [piece for piece in self._pieces if piece.touches(place)]
        if any(piece.users is None for piece in touched):
            return None
        self._pieces = [piece for piece in self._pieces if not piece.touches(place)]
        self._pieces.append(place)
        self.next = following
        self.rounds += following == 0
        self.ready[group] = place
        return group, place, tuple({user for piece in touched for user in piece.users or ()})

    def free(self, group: int, users: tuple[int, ...]) -> None:
        """The place of ``group`` may be taken once ``users`` are done."""
        self.ready.pop(group).users = users

    def _best(self, size: int, following: int) -> Piece:
        last = self._capacity - size
        starts = {0, last, *(piece.end for piece in self._pieces), *(piece.start - size for piece in self._pieces)}
        within = sorted(start for start in starts if 0 <= start <= last)
        apart = [start for start in within if max(start, last - start) >= following]
        places = [Piece(start, start + size) for start in apart or within]
        return min(places, key=self._newest_touched)

    def _newest_touched(self, place: Piece) -> int:
        return max((age for age, piece in enumerate(self._pieces) if piece.touches(place)), default=-1)
