"""Factors that lie at equal distances, in an adapter's file and where they are to lie: each such run is one copy. Pure.

An adapter changes the same modules in every layer, and files hold the layers one behind the other: hundreds of factors
are a handful of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexbatch.lora.adapter import AdapterPart, Factor

Spot = tuple[int, int]
"""Where a factor comes to lie: a stretch of memory, by its number, and the elements before the factor in it."""


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` factors like ``first``; ``step``: bytes from one to the next in the file.

    They come to lie as [rank, width] each, turned if they are b, from element ``place`` of stretch ``stretch`` on,
    ``stride`` elements from one to the next.
    """

    first: Factor
    turned: bool
    count: int
    step: int
    stretch: int
    place: int
    stride: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """What comes to lie: [count, rank, width]."""
        rows, columns = self.first.shape
        return (self.count, columns, rows) if self.turned else (self.count, rows, columns)


def runs_of(parts: Sequence[AdapterPart], spots: Callable[[AdapterPart], tuple[Spot, Spot]]) -> tuple[Run, ...]:
    """The factors of ``parts``, each in one run; ``spots`` says where a part's a and b come to lie."""
    alike: dict[object, list[tuple[Factor, Spot]]] = {}
    for part in parts:
        for side, (factor, spot) in enumerate(zip((part.a, part.b), spots(part), strict=True)):
            kind = (side, part.module.linear, part.module.part, factor.dtype, factor.shape, spot[0])
            alike.setdefault(kind, []).append((factor, spot))
    found: list[Run] = []
    for (side, *_), factors in alike.items():  # type: ignore[misc]
        factors.sort(key=lambda each: each[0].offset)
        begin = 0
        while begin < len(factors):
            stop = _equal_distances(factors, begin)
            (first, (stretch, place)), count = factors[begin], stop - begin
            second, (_, next_place) = factors[begin + 1] if count > 1 else factors[begin]
            step, stride = second.offset - first.offset, next_place - place
            found.append(Run(first, bool(side), count, step, stretch, place, stride))
            begin = stop
    return tuple(found)


def _equal_distances(factors: Sequence[tuple[Factor, Spot]], begin: int) -> int:
    """Where the run that begins at ``begin`` ends: in file and memory each is as far from the one before it."""

    def distance(number: int) -> tuple[int, int]:
        (one, (_, place)), (other, (_, next_place)) = factors[number - 1], factors[number]
        return other.offset - one.offset, next_place - place

    stop = begin + 1
    while stop < len(factors) and distance(stop)[1] > 0 and distance(stop) == distance(begin + 1):
        stop += 1
    return stop
