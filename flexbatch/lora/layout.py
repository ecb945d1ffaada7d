"""Where the numbers of an adapter lie: in rows of flat memory, or end to end in an image of each group. Pure.

Adapters that change the same modules by the same ranks share a layout; the numbers of one are found by where it begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexbatch.lora.adapter import AdapterPart
from flexbatch.lora.modules import Module
from flexbatch.lora.runs import Run, Spot, runs_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class ModuleIndex:
    """The modules of a base model, numbered, and the different widths of their factors' rows."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self.modules = tuple(modules.values())
        self.number = {module.name: place for place, module in enumerate(self.modules)}
        self.widths = tuple(sorted({w for m in self.modules for w in (m.in_features, m.out_features)}))
        self.by_linear: dict[tuple[int, str], list[int]] = {}
        for place, module in enumerate(self.modules):
            self.by_linear.setdefault((module.group, module.linear), []).append(place)
        self.groups = 1 + max(module.group for module in self.modules)


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Factors in rows of flat memory: all rows of one width lie together, so that memory seen in that width has them.

    Modules that read the same input have their factors a one behind the other: one product may read them all. Groups
    follow each other as in the adapter's file, which are few ``runs`` then; a width is a stretch. Arrays are by module
    number: ``ranks`` (0: not changed), ``scales``, and the first rows of both factors (b transposed)
    among those of their width, of which there are ``rows[w]``.
    """

    ranks: Ints
    scales: Floats
    a_rows: Ints
    b_rows: Ints
    rows: Ints
    elements: int
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, parts: Sequence[AdapterPart], index: ModuleIndex) -> FlatLayout:
        """Lay the factors of ``parts`` out; ``elements`` is enough wherever the memory begins."""
        begins: dict[int, int] = {}
        for part in parts:
            begins[part.module.group] = min(begins.get(part.module.group, part.a.offset), part.a.offset)
        parts = sorted(parts, key=lambda part: begins[part.module.group])
        count = len(index.modules)
        ranks, a_rows, b_rows = (np.zeros(count, dtype=np.int64) for _ in range(3))
        scales = np.zeros(count, dtype=np.float32)
        rows = np.zeros(len(index.widths), dtype=np.int64)
        place = {width: number for number, width in enumerate(index.widths)}
        sides = [(a_rows, part, part.module.in_features) for part in parts]
        sides += [(b_rows, part, part.module.out_features) for part in parts]
        for first, part, width in sides:
            number = index.number[part.module.name]
            ranks[number], scales[number] = part.rank, part.scale
            first[number] = rows[place[width]]
            rows[place[width]] += part.rank
        widths = np.array(index.widths)
        elements = int((rows * widths).sum() + (widths[rows > 0] - 1).sum())

        def spots(part: AdapterPart) -> tuple[Spot, Spot]:
            number, into, out = index.number[part.module.name], part.module.in_features, part.module.out_features
            return (place[into], int(a_rows[number]) * into), (place[out], int(b_rows[number]) * out)

        return cls(ranks, scales, a_rows, b_rows, rows, elements, runs_of(parts, spots))

    def stretches(self, start: int, index: ModuleIndex) -> Ints:
        """For every width, the element where its rows begin if the memory begins at element ``start``."""
        elements: Ints = self.bases(start, index) * np.array(index.widths)
        return elements

    def bases(self, start: int, index: ModuleIndex) -> Ints:
        """For every width, the number of the first row of that width at or after element ``start``."""
        bases = np.zeros(len(index.widths), dtype=np.int64)
        position = start
        for place, width in enumerate(index.widths):
            if self.rows[place]:
                bases[place] = -(-position // width)
                position = int(bases[place] + self.rows[place]) * width
        return bases


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Factors end to end, group by group: what travels to a GPU's pages in one piece.

    Arrays by module number: ``ranks``, ``scales``, and where both factors (b transposed) begin in their group's image.
    ``starts`` [groups + 1]: where each group's image begins. All of it is one stretch.
    """

    ranks: Ints
    scales: Floats
    a_starts: Ints
    b_starts: Ints
    starts: Ints
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, parts: Sequence[AdapterPart], index: ModuleIndex) -> ImageLayout:
        """Lay the factors of ``parts`` out."""
        count = len(index.modules)
        ranks, a_starts, b_starts = (np.zeros(count, dtype=np.int64) for _ in range(3))
        scales = np.zeros(count, dtype=np.float32)
        sizes = np.zeros(index.groups, dtype=np.int64)
        for part in parts:
            number, group = index.number[part.module.name], part.module.group
            ranks[number], scales[number] = part.rank, part.scale
            a_starts[number] = sizes[group]
            b_starts[number] = sizes[group] + part.rank * part.module.in_features
            sizes[group] += part.elements
        starts = np.concatenate(([0], np.cumsum(sizes)))

        def spots(part: AdapterPart) -> tuple[Spot, Spot]:
            number, before = index.number[part.module.name], int(starts[part.module.group])
            return (0, before + int(a_starts[number])), (0, before + int(b_starts[number]))

        return cls(ranks, scales, a_starts, b_starts, starts, runs_of(parts, spots))

    @staticmethod
    def stretches(start: int, index: ModuleIndex) -> Ints:  # noqa: ARG004  as of a flat layout
        """The element where everything begins, if the memory begins at element ``start``."""
        return np.array([start])

    @property
    def elements(self) -> int:
        """Numbers in all images."""
        return int(self.starts[-1])

    def size(self, group: int) -> int:
        """Numbers in the image of one group."""
        return int(self.starts[group + 1] - self.starts[group])
