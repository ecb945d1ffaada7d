"""The adapters of a run where products read them: an arena in RAM and, on a GPU, pages of the pool that KV lies in.

Carries out ``adapter_read`` and ``adapter_up`` Steps, and binds the adapters of a micro-batch to its products. Which
adapter is where is the scheduler's decision (``scheduler.adapters``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from flexbatch.checkpoint.tensors import DTYPES
from flexbatch.errors import AdapterError
from flexbatch.kernels.lora import FACTOR_TYPES, resting_type
from flexbatch.lora.adapter import Adapter
from flexbatch.lora.layout import FlatLayout, ImageLayout, ModuleIndex
from flexbatch.lora.load import FactorReader, Place, file_room
from flexbatch.lora.runs import Run
from flexbatch.memory.kv import KVPool
from flexbatch.runtime.adapter_rows import AdapterRows
from flexbatch.runtime.adapter_tables import FlatTable, Kinds, PagedTable
from flexbatch.runtime.device import Device
from flexbatch.scheduler.adapters import AdapterCache, AdapterMoves, AdapterSize
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.sweep import MicroBatch

_ALIGNMENT = 64


class BoundAdapters(Protocol):
    """The adapters of a micro-batch, found in memory."""

    def add(self, group: int, linear: str, x: Tensor, y: Tensor) -> None:
        """Add what the adapters make of x [T, in] to y [T, out], the product of a linear of the base model."""

    def select(self, rows: Sequence[int]) -> BoundAdapters | None:
        """The same for a choice of the micro-batch's rows, in that order; None if no adapter is among them."""


class AdapterStore(Protocol):
    """What a run needs of its adapters' memory."""

    failures: dict[str, AdapterError]
    """Adapters that could not be read when they were needed; their factors are zeros."""

    @property
    def bytes_read(self) -> int:
        """Bytes of adapters that were read from disk."""

    def begin(self, moves: AdapterMoves) -> None:
        """Note what the sweep that follows moves, in the order of its Steps."""

    def read(self, step: Step) -> None:
        """Disk to arena."""

    def up(self, step: Step) -> None:
        """A group's part from the arena to the GPU's pages."""

    def bind(self, batch: MicroBatch) -> BoundAdapters | None:
        """The adapters of a micro-batch's rows; None if all are of the base model."""


class FlatStore:
    """On a CPU products read the arena itself: uint8 ``arena``, each adapter's numbers in a type that kernels read."""

    def __init__(self, adapters: Mapping[str, Adapter], index: ModuleIndex, cache: AdapterCache, arena: Tensor) -> None:
        self._adapters = adapters
        self._index = index
        self._cache = cache
        self._flats = [arena[: arena.numel() // 4 * 4].view(dtype) for dtype in FACTOR_TYPES]
        self._rows = {
            width: [flat[: flat.numel() // width * width].view(-1, width) for flat in self._flats]
            for width in index.widths
        }
        self._kinds = Kinds(FlatLayout, index)
        self._type = _Types(adapters)
        self._bound: dict[object, FlatTable] = {}  # in this sweep
        self._bound_before: dict[object, FlatTable] = {}  # in the last one, whose rows are often the same
        flats, type_ = self._flats, self._type  # not this store itself: it would keep the arena when nobody else does
        self._files = _Files(adapters, self._kinds, index, lambda adapter: flats[type_(adapter.name)])
        self.failures = self._files.failures

    @staticmethod
    def size(adapter: Adapter, index: ModuleIndex) -> AdapterSize:
        """What an adapter takes: enough for its factors, and before those for its file's bytes."""
        return AdapterSize(_aligned(_flat_bytes(adapter, FlatLayout.of(adapter.parts, index))))

    @property
    def bytes_read(self) -> int:
        """Bytes of adapters that were read from disk."""
        return self._files.bytes_read

    def begin(self, moves: AdapterMoves) -> None:
        """Note where what is read comes to lie."""
        self._bound_before, self._bound = self._bound, {}
        for names in (moves.reads, moves.fetches):
            self._files.queue([(name, self._start(name)) for name in names])

    def read(self, step: Step) -> None:  # noqa: ARG002  the same for all
        """Disk to arena; factors are laid out there by the thread that needs them.

        Done beside products that use every processor, it would hold them all up whenever it takes one from them.
        """
        self._files.fetch()

    def up(self, step: Step) -> None:
        """Nothing: the arena is the pool."""

    def bind(self, batch: MicroBatch) -> BoundAdapters | None:
        """The adapters of a micro-batch's rows; None if all are of the base model."""
        rows = AdapterRows.of(batch)
        if rows is None:
            return None
        starts = [self._start(name) for name in rows.names]
        key = rows.names, rows.spans, tuple(starts)
        if key in self._bound_before:
            self._bound[key] = self._bound_before[key].again()
            return self._bound[key]
        parts = [self._adapters[name].parts for name in rows.names]
        layouts = [self._kinds.layout(own) for own in parts]
        bases = [layout.bases(start, self._index) for layout, start in zip(layouts, starts, strict=True)]
        types = [self._type(name) for name in rows.names]
        gathered, lay = self._kinds.gather(parts), self._files.lay
        self._bound[key] = FlatTable(rows, self._index, gathered, bases, types, self._rows, lay)
        return self._bound[key]

    def _start(self, name: str) -> int:
        return self._cache.start(name) // FACTOR_TYPES[self._type(name)].itemsize


class PagedStore:
    """With a GPU tier: images in the arena, and pages of ``pool``, in ``dtype``.

    A layer's image fills an adapter's first pages in that layer. Those of the embedding and the head are cut into
    pieces of a page that follow in the layers' further pages, one a layer.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        index: ModuleIndex,
        cache: AdapterCache,
        arena: Tensor,
        pool: KVPool,
        device: Device,
        dtype: torch.dtype,
    ) -> None:
        self._adapters = adapters
        self._index = index
        self._cache = cache
        self._dtype = dtype
        self._flat = arena.view(dtype)
        self._pages = [pool.raw(layer).view(dtype) for layer in range(index.groups - 2)]  # [pages, P] each
        self._device = device
        self._kinds = Kinds(ImageLayout, index)
        flat = self._flat  # not this store itself: it would keep its memory when nobody else does
        self._files = _Files(adapters, self._kinds, index, lambda _: flat)
        self._uploads: list[tuple[ImageLayout, int, list[int]]] = []
        self.failures = self._files.failures

    @staticmethod
    def size(adapter: Adapter, index: ModuleIndex, page_bytes: int, dtype: torch.dtype) -> AdapterSize:
        """What an adapter takes."""
        layout = ImageLayout.of(adapter.parts, index)
        numbers = page_bytes // dtype.itemsize
        layers, edges = _page_counts(layout, numbers)
        return AdapterSize(_aligned(layout.elements * dtype.itemsize), layers + -(-edges // (index.groups - 2)))

    @property
    def bytes_read(self) -> int:
        """Bytes of adapters that were read from disk."""
        return self._files.bytes_read

    def begin(self, moves: AdapterMoves) -> None:
        """Note where what is read comes to lie, and which pages are filled; forget what KV could be taken for."""
        for names in (moves.reads, moves.fetches):
            self._files.queue([(name, self._start(name)) for name in names])
        self._uploads = [
            (self._kinds.layout(self._adapters[name].parts), self._start(name), list(self._cache.pages(name)))
            for name in moves.uploads
        ]
        if moves.clears:
            with self._device.lane(self._device.compute):
                pages = torch.tensor(moves.clears, device=self._device.torch_device)
                for layer in self._pages:
                    layer.index_fill_(0, pages, 0)

    def read(self, step: Step) -> None:  # noqa: ARG002  the same for all
        """Disk to arena."""
        self._files.read()

    def up(self, step: Step) -> None:
        """A group's images from the arena to their pages."""
        for layout, start, pages in self._uploads:
            begin = start + int(layout.starts[step.group])
            size = layout.size(step.group)
            for piece, place in enumerate(self._places(layout, step.group, pages)):
                first = piece * place.numel()
                count = min(place.numel(), size - first)
                self._device.copy(place[:count], self._flat[begin + first : begin + first + count], "h2d")

    def bind(self, batch: MicroBatch) -> BoundAdapters | None:
        """The adapters of a micro-batch's rows; None if all are of the base model."""
        rows = AdapterRows.of(batch)
        if rows is None:
            return None
        parts = [self._adapters[name].parts for name in rows.names]
        pages = [list(self._cache.pages(name)) for name in rows.names]
        layouts = [self._kinds.layout(own) for own in parts]
        return PagedTable(rows, self._index, self._kinds.gather(parts), pages, self._pages, layouts, self._edge)

    def _places(self, layout: ImageLayout, group: int, pages: list[int]) -> list[Tensor]:
        """The pieces of pages that a group's image fills, in order."""
        numbers = self._pages[0].shape[1]
        count = -(-layout.size(group) // numbers)
        if 0 < group < self._index.groups - 1:
            return [self._pages[group - 1][page] for page in pages[:count]]
        layers, _ = _page_counts(layout, numbers)
        before = 0 if group == 0 else -(-layout.size(0) // numbers)
        where = [divmod(before + piece, len(self._pages)) for piece in range(count)]
        return [self._pages[layer][pages[layers + page]] for page, layer in where]

    def _edge(self, layout: ImageLayout, group: int, pages: list[int]) -> Tensor:
        """The image of the embedding or the head, gathered from its pieces."""
        return torch.cat(self._places(layout, group, pages))

    def _start(self, name: str) -> int:
        return self._cache.start(name) // self._dtype.itemsize


class _Types:
    """By an adapter's name the place in ``FACTOR_TYPES`` of the type in which it lies; found once."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = adapters
        self._found: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        if name not in self._found:
            self._found[name] = _type_of(self._adapters[name])
        return self._found[name]


class _Files:
    """Reads adapters in the order in which they were queued, one Step a batch of them.

    ``memory`` gives all memory in the type in which an adapter lies there.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        kinds: Kinds[FlatLayout] | Kinds[ImageLayout],
        index: ModuleIndex,
        memory: Callable[[Adapter], Tensor],
    ) -> None:
        self._adapters = adapters
        self._kinds = kinds
        self._index = index
        self._memory = memory
        self._reader = FactorReader()
        self._layer_out = FactorReader()  # of another thread
        self._fetched: dict[str, tuple[int, Tensor]] = {}  # where each is to lie, and its bytes as the file has them
        self._batches: deque[list[tuple[str, int]]] = deque()
        self.failures: dict[str, AdapterError] = {}

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    def queue(self, batch: list[tuple[str, int]]) -> None:
        """Adapters, and the element where each is to begin."""
        if batch:
            self._batches.append(batch)

    def read(self) -> None:
        """Read the next batch and lay its factors out."""
        for name, start in self._batches.popleft():
            with self._filling(name, start) as (adapter, runs, place):
                self._reader.read(adapter, runs, place)

    def fetch(self) -> None:
        """Read the next batch; what the disk brings rests in the adapters' own memory, if it fits, until ``lay``."""
        for name, start in self._batches.popleft():
            self._fetched.pop(name, None)
            with self._filling(name, start) as (adapter, runs, place):
                raw = self._reader.fetch(adapter, runs, self._room(adapter, start))
                if raw is None:
                    self._reader.read(adapter, runs, place)
                else:
                    self._fetched[name] = start, raw

    def _room(self, adapter: Adapter, start: int) -> Tensor:
        """All bytes of an adapter that lies in flat memory from element ``start`` on."""
        layout, flat = self._kinds.layout(adapter.parts), self._memory(adapter)
        assert isinstance(layout, FlatLayout)
        first = start * flat.itemsize
        return flat.view(torch.uint8)[first : first + _flat_bytes(adapter, layout)]

    def lay(self, names: Sequence[str]) -> None:
        """Lay out the factors of adapters that were fetched: the processor's part, for the thread of the products."""
        for name in names:
            if name in self._fetched:
                start, raw = self._fetched.pop(name)
                with self._filling(name, start) as (adapter, runs, place):
                    self._layer_out.spread(adapter, raw, runs, place)

    @contextmanager
    def _filling(self, name: str, start: int) -> Iterator[tuple[Adapter, Sequence[Run], Place]]:
        """Do something to an adapter's memory; if that fails it is zeros, and the adapter is among the failures."""
        adapter = self._adapters[name]
        layout, flat = self._kinds.layout(adapter.parts), self._memory(adapter)
        region, stretches = flat[start : start + layout.elements], layout.stretches(start, self._index)

        def place(run: Run) -> Tensor:
            strides = (run.stride, run.shape[2], 1)
            return flat.as_strided(run.shape, strides, int(stretches[run.stretch]) + run.place)

        try:
            yield adapter, layout.runs, place
        except AdapterError as error:
            region.zero_()
            self.failures[name] = error


def _flat_bytes(adapter: Adapter, layout: FlatLayout) -> int:
    """What an adapter takes in flat memory: as many bytes as its file's, if those are hardly more than its factors'."""
    laid = layout.elements * FACTOR_TYPES[_type_of(adapter)].itemsize
    room = file_room(layout.runs)
    return max(laid, room) if 4 * room <= 5 * laid else laid


def _type_of(adapter: Adapter) -> int:
    """The place in ``FACTOR_TYPES`` of the type in which an adapter lies in flat memory: its file's, if it has one."""
    stored = {factor.dtype for part in adapter.parts for factor in (part.a, part.b)}
    return FACTOR_TYPES.index(resting_type(DTYPES[stored.pop()]) if len(stored) == 1 else torch.float32)


def _page_counts(layout: ImageLayout, numbers: int) -> tuple[int, int]:
    """Pages of the largest layer's image, and pieces of pages that the embedding's and the head's fill."""
    groups = len(layout.starts) - 1
    layers = max((-(-layout.size(group) // numbers) for group in range(1, groups - 1)), default=0)
    return layers, sum(-(-layout.size(group) // numbers) for group in (0, groups - 1))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
