"""The adapters of one micro-batch as arrays, a product at a time: ranks, scales and places, ready for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from flexbatch.kernels.lora import FlatFactors, FlatProduct, PagedFactors, add_paged
from flexbatch.lora.adapter import AdapterPart
from flexbatch.lora.layout import FlatLayout, Floats, ImageLayout, Ints, ModuleIndex
from flexbatch.runtime.adapter_rows import AdapterRows

Parts = tuple[AdapterPart, ...]
_Layout = TypeVar("_Layout", FlatLayout, ImageLayout)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Arrays [modules, adapters] of a micro-batch. ``a`` and ``b``: where factors begin, in their layout's sense.

    ``changed`` [modules]: whether any of the adapters changes it.
    """

    ranks: Ints
    scales: Floats
    a: Ints
    b: Ints
    changed: list[bool]


class Kinds(Generic[_Layout]):
    """The layouts of a run's adapters, each kind once."""

    def __init__(self, layout: type[_Layout], index: ModuleIndex) -> None:
        self._of: Callable[[Parts, ModuleIndex], _Layout] = layout.of
        self._index = index
        self._layouts: dict[int, tuple[Parts, _Layout]] = {}  # by identity: the reader shares parts among equals

    def layout(self, parts: Parts) -> _Layout:
        """The layout of adapters with these parts."""
        found = self._layouts.get(id(parts))
        if found is None:
            found = self._layouts[id(parts)] = (parts, self._of(parts, self._index))
        return found[1]

    def gather(self, parts: Sequence[Parts]) -> Gathered:
        """The arrays of several adapters side by side."""
        layouts = [self.layout(own) for own in parts]
        places = [
            (layout.a_rows, layout.b_rows) if isinstance(layout, FlatLayout) else (layout.a_starts, layout.b_starts)
            for layout in layouts
        ]
        ranks = np.stack([layout.ranks for layout in layouts], axis=1)
        return Gathered(
            ranks,
            np.stack([layout.scales for layout in layouts], axis=1),
            np.stack([a for a, _ in places], axis=1),
            np.stack([b for _, b in places], axis=1),
            [bool(own.any()) for own in ranks],
        )


class FlatTable:
    """Adapters in flat memory; ``bases``: for each, the first row of every width, in the adapter's own type.

    ``types``: the place of each one's type in ``FACTOR_TYPES``; ``memory``: all of it by width, in each type.
    ``lay`` is told their names before they are first read: it brings to their places what is there but not laid out.
    """

    def __init__(
        self,
        rows: AdapterRows,
        index: ModuleIndex,
        gathered: Gathered,
        bases: Sequence[Ints],
        types: Sequence[int],
        memory: Mapping[int, Sequence[Tensor]],
        lay: Callable[[Sequence[str]], None],
    ) -> None:
        self._rows = rows
        self._index = index
        self._gathered = gathered
        self._bases = np.stack(bases, axis=1)  # [widths, adapters]
        self._own_bases = list(bases)
        self._types = np.array(types)
        self._memory = memory
        self._lay = lay
        self._laid = False
        self._products: dict[tuple[int, str], tuple[FlatProduct, list[slice]] | None] = {}

    def again(self) -> FlatTable:
        """The same for a sweep with the same rows and adapters, of which some may have been read once more."""
        self._laid = False
        return self

    def add(self, group: int, linear: str, x: Tensor, y: Tensor) -> None:
        """Add what the adapters make of x [T, in] to y [T, out], in place."""
        key = group, linear
        if key not in self._products:
            self._products[key] = self._product(group, linear)
        known = self._products[key]
        if known is None:
            return
        if not self._laid:
            self._lay(self._rows.names)
            self._laid = True
        product, columns = known
        product.add([y[:, own] for own in columns], x)

    def _product(self, group: int, linear: str) -> tuple[FlatProduct, list[slice]] | None:
        """What is added to a linear of the base model, and each module's columns in it; None if nothing."""
        numbers = [n for n in self._index.by_linear.get((group, linear), ()) if self._gathered.changed[n]]
        if not numbers:
            return None
        modules = [self._index.modules[number] for number in numbers]
        columns = [slice(module.column, module.column + module.out_features) for module in modules]
        return FlatProduct(self._rows.groups, [self._factors(number) for number in numbers]), columns

    def _factors(self, number: int) -> FlatFactors:
        module, widths, gathered = self._index.modules[number], self._index.widths, self._gathered
        into, out = module.in_features, module.out_features
        return FlatFactors(
            self._memory[into],
            self._memory[out],
            self._types,
            gathered.ranks[number],
            gathered.scales[number],
            self._bases[widths.index(into)] + gathered.a[number],
            self._bases[widths.index(out)] + gathered.b[number],
        )

    def select(self, rows: Sequence[int]) -> FlatTable | None:
        """The same for a choice of rows."""
        chosen = self._rows.select(rows)
        if chosen is None:
            return None
        types = self._types.tolist()
        return FlatTable(chosen, self._index, self._gathered, self._own_bases, types, self._memory, self._lay)


class PagedTable:
    """Adapters in pages: ``pages`` of each; ``layers`` [pages, P] the pool of every layer.

    ``edge`` gathers the image of the embedding or the head from its pieces.
    """

    def __init__(
        self,
        rows: AdapterRows,
        index: ModuleIndex,
        gathered: Gathered,
        pages: Sequence[list[int]],
        layers: Sequence[Tensor],
        layouts: Sequence[ImageLayout],
        edge: Callable[[ImageLayout, int, list[int]], Tensor],
    ) -> None:
        self._rows = rows
        self._index = index
        self._gathered = gathered
        self._pages = pages
        self._layers = layers
        self._layouts = layouts
        self._edge = edge
        self._tables: Tensor | None = None  # made by the first product, in the lane that reads it

    def add(self, group: int, linear: str, x: Tensor, y: Tensor) -> None:
        """Add what the adapters make of x [T, in] to y [T, out], in place."""
        numbers = [n for n in self._index.by_linear.get((group, linear), ()) if self._gathered.changed[n]]
        if not numbers:
            return
        pool, tables = self._where(group)
        for number in numbers:
            module = self._index.modules[number]
            factors = PagedFactors(
                pool,
                tables,
                self._gathered.ranks[number],
                self._gathered.scales[number],
                self._gathered.a[number],
                self._gathered.b[number],
            )
            add_paged(y[:, module.column : module.column + module.out_features], x, self._rows.groups, factors)

    def select(self, rows: Sequence[int]) -> PagedTable | None:
        """The same for a choice of rows."""
        chosen = self._rows.select(rows)
        if chosen is None:
            return None
        return PagedTable(chosen, self._index, self._gathered, self._pages, self._layers, self._layouts, self._edge)

    def _where(self, group: int) -> tuple[Tensor, Tensor]:
        """The pool and the page tables of a group."""
        if 0 < group < self._index.groups - 1:
            if self._tables is None:
                self._tables = _table(self._pages, self._layers[0].device)
            return self._layers[group - 1], self._tables
        images = [
            self._edge(layout, group, pages) if layout.size(group) else self._layers[0][:0].flatten()
            for layout, pages in zip(self._layouts, self._pages, strict=True)
        ]
        numbers = self._layers[0].shape[1]
        counts = [image.numel() // numbers for image in images]
        firsts = np.cumsum([0, *counts])
        own = [list(range(first, first + count)) for first, count in zip(firsts, counts, strict=False)]
        return torch.cat(images).view(-1, numbers), _table(own, self._layers[0].device)


def _table(pages: Sequence[list[int]], device: torch.device) -> Tensor:
    """Page tables int32 [adapters, M], filled up with 0."""
    table = np.zeros((len(pages), max(1, max(map(len, pages)))), dtype=np.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(table).to(device, non_blocking=True)
