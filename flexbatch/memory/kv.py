"""The paged KV cache on every tier: pools in RAM and on the GPU, a spill file on disk, and lanes between them.

A page holds ``page_tokens`` tokens of one layer, [kv_heads, 2, page_tokens, head_dim], so that the keys (or values) of
any run of pages are one batch of matrices with a single stride: a batched product reads them where they are. In 4 bits
it is uint8 [kv_heads, 2, bytes of a head's keys or values] (see ``kernels.kv4``), on every tier and on its way.
Which sequence holds which page is not its concern.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.memory.spill import SpillFile
from flexbatch.policy.footprint import kv_area_bytes, packed_page_bytes

Allocate = Callable[[int], Tensor]


@dataclass(frozen=True, slots=True)
class PageShape:
    """What a page of one layer looks like: numbers of ``dtype``, or in 4 ``bits`` packed ones."""

    kv_heads: int
    page_tokens: int
    head_dim: int
    dtype: torch.dtype
    bits: int = 16

    @property
    def nbytes(self) -> int:
        """Bytes of a page of one layer."""
        if self.bits == 4:
            return packed_page_bytes(self.page_tokens, self.kv_heads, self.head_dim)
        return 2 * self.kv_heads * self.page_tokens * self.head_dim * self.dtype.itemsize

    def view(self, raw: Tensor) -> Tensor:
        """uint8 [n * nbytes] -> [n, kv_heads, 2, page_tokens, head_dim], or packed [n, kv_heads, 2, bytes]."""
        if self.bits == 16:
            return raw.view(self.dtype).view(-1, self.kv_heads, 2, self.page_tokens, self.head_dim)
        area = kv_area_bytes(self.page_tokens, self.head_dim)
        pages = raw.view(-1, self.nbytes)[:, : 2 * self.kv_heads * area]
        packed: Tensor = pages.unflatten(1, (self.kv_heads, 2, area))
        return packed


@dataclass(frozen=True, slots=True)
class StagedPage:
    """A page of a micro-batch that travels: its id in its pool, whether anything is in it yet, or is written to it."""

    page: int
    filled: bool
    dirty: bool


class KVPool:
    """Pages of all layers in directly addressable memory.

    Fresh memory must read as zeros, never as NaN: a masked position has weight 0, and 0 times NaN would still be NaN.
    """

    def __init__(self, shape: PageShape, num_layers: int, num_pages: int, allocate: Allocate) -> None:
        self.num_pages = num_pages
        self._raw = [allocate(num_pages * shape.nbytes).view(-1, shape.nbytes) for _ in range(num_layers)]
        self._layers = [shape.view(raw.view(-1)) for raw in self._raw]

    def layer(self, index: int) -> Tensor:
        """The pool of one layer, [pages, kv_heads, 2, page_tokens, head_dim], or packed."""
        return self._layers[index]

    def raw(self, index: int) -> Tensor:
        """The bytes of one layer, uint8 [pages, bytes of a page]: pages may hold other things than KV."""
        return self._raw[index]


class DiskPages:
    """Pages of all layers in a spill file; ``shape.nbytes`` is a multiple of its block."""

    def __init__(self, shape: PageShape, num_pages: int, file: SpillFile, base: int) -> None:
        self._shape = shape
        self._num_pages = num_pages
        self._file = file
        self._base = base

    def read(self, layer: int, lane: Tensor, staged: list[StagedPage]) -> None:
        """Fill the lane's places with the staged pages that hold anything."""
        self._file.read_many(self._parts(layer, lane, staged, lambda page: page.filled))

    def write(self, layer: int, lane: Tensor, staged: list[StagedPage]) -> None:
        """Write the staged pages that were written to."""
        self._file.write_many(self._parts(layer, lane, staged, lambda page: page.dirty))

    def _parts(
        self, layer: int, lane: Tensor, staged: list[StagedPage], wanted: Callable[[StagedPage], bool]
    ) -> list[tuple[int, Tensor]]:
        size = self._shape.nbytes
        return [
            (
                self._base + (layer * self._num_pages + page.page) * size,
                lane[place * size : (place + 1) * size],
            )
            for place, page in enumerate(staged)
            if wanted(page)
        ]


@dataclass(frozen=True, slots=True)
class KVMemory:
    """All of a run's KV memory. ``host_lanes`` and ``gpu_lanes`` are uint8 buffers for pages on their way."""

    shape: PageShape
    pools: Mapping[str, KVPool]
    disk: DiskPages | None
    host_lanes: list[Tensor]
    gpu_lanes: list[Tensor]
