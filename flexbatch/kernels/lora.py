"""LoRA: adds ``scale * (x @ a.T) @ b.T`` of many adapters, of any ranks, to the rows of a product that name one.

Rows without an adapter are never touched, and no rank is padded. Factors lie row by row (b transposed) in flat memory
or in pages; which adapter lies where is the caller's knowledge.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flexbatch.kernels import native

BACKENDS: dict[str, str] = {"cuda": "flexbatch.kernels.lora_triton"}
"""Device type -> the module with its kernels, imported when first used (see ``LoraBackend``)."""

COMPILED = "flexbatch.kernels.lora_numba"
"""The module with a CPU's compiled kernels, imported when first used: there may be no Numba."""

_RUNS = 8  # of rows, up to which each is added on its own: adding to scattered rows is many times slower
_FEW = 8  # rows of one adapter from which on products of their own are faster than the sparse ones of all adapters

_DISTINCT = 0.75  # adapters to a row, below which rows are put side by side by adapter: a cache then reads each once

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ByAdapter:
    """Rows ``order`` [R], those of one adapter side by side, and its ``owners`` [R].

    The ``counts[i]`` rows of ``adapters[i]`` begin at place ``firsts[i]``.
    """

    order: Ints
    owners: Ints
    adapters: Ints
    firsts: Ints
    counts: Ints


@dataclass(slots=True)
class RowGroups:
    """The rows of a micro-batch that have an adapter. Adapters are numbers from 0.

    ``spans``: (adapter, first row, row after the last) of many rows of one adapter that lie together: products read
    and write them where they are. ``order``: all other rows, those of one adapter side by side: first those of
    ``many``: (adapter, its first and last place in the order, the latter not included), where an adapter has more than
    a few; then the few rows of all others, ``owners`` being the adapter of each: in their own order, unless so many
    share adapters that it pays to have those side by side. ``runs``: (row, place in ``back``, rows) of unbroken runs of
    rows, where ``back`` are the places of rows in the order; both only serve to write results fast.
    """

    spans: list[tuple[int, int, int]]
    order: Tensor
    many: list[tuple[int, int, int]]
    owners: Ints
    runs: list[tuple[int, int, int]]
    back: Tensor | None
    _patterns: dict[bytes, _Pattern] = field(default_factory=dict)
    _by_adapter: ByAdapter | None = None

    @property
    def first_few(self) -> int:
        """Where in the order the few rows begin."""
        return len(self.order) - len(self.owners)

    def by_adapter(self) -> ByAdapter:
        """All rows, those of one adapter side by side; found once."""
        if self._by_adapter is None:
            many = [np.full(stop - first, adapter) for adapter, first, stop in (*self.spans, *self.many)]
            together = [np.arange(first, stop) for _, first, stop in self.spans]
            owners = np.concatenate([*many, self.owners])
            sort = np.argsort(owners, kind="stable")
            adapters, firsts, counts = np.unique(owners[sort], return_index=True, return_counts=True)
            order = np.concatenate([*together, self.order.numpy()])[sort]
            self._by_adapter = ByAdapter(order, owners[sort], adapters, firsts, counts)
        return self._by_adapter

    def pattern(self, ranks: Ints) -> _Pattern:
        """The places of the few rows' inner numbers, for adapters of these ``ranks`` [adapters]; found once."""
        own = ranks[self.owners]
        key = own.tobytes()
        if key not in self._patterns:
            self._patterns[key] = _Pattern.of(own, self.owners)
        return self._patterns[key]

    def take(self, x: Tensor) -> Tensor:
        """X [T, in] -> its rows in the order [R, in]; a view where they lie like that."""
        if self.back is None and len(self.runs) == 1:
            row, _, count = self.runs[0]
            return x[row : row + count]
        return x.index_select(0, self.order.to(x.device))

    def give(self, y: Tensor, delta: Tensor) -> None:
        """Add ``delta`` [R, out], in the order, to the rows of y [T, out]."""
        if len(self.runs) > _RUNS:
            y.index_add_(0, self.order.to(y.device), delta)
            return
        sorted_ = delta if self.back is None else delta.index_select(0, self.back.to(y.device))
        for row, place, count in self.runs:
            y[row : row + count].add_(sorted_[place : place + count])


@dataclass(frozen=True, slots=True)
class _Pattern:
    """N inner numbers of R rows, row by row. ``starts`` int64 [R + 1]: where each row's begin.

    ``owners`` [N]: their adapter; ``steps`` [N]: their place within its rank.
    """

    starts: Tensor
    owners: Ints
    steps: Ints

    @classmethod
    def of(cls, ranks: Ints, owners: Ints) -> _Pattern:
        starts = np.concatenate(([0], np.cumsum(ranks)))
        return cls(torch.from_numpy(starts), np.repeat(owners, ranks), _steps(ranks))

    def columns(self, firsts: Ints) -> Tensor:
        """Rows of a matrix of factors, int64 [N], where those of each adapter begin at ``firsts`` [adapters]."""
        return torch.from_numpy(firsts[self.owners] + self.steps)


FACTOR_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types in which factors rest in flat memory."""


def resting_type(stored: torch.dtype) -> torch.dtype:
    """The type in which factors of a file's type rest in flat memory: their own, where a kernel reads it."""
    if stored in FACTOR_TYPES and native.usable(torch.float32) and _compiled().reads(stored):
        return stored
    return torch.float32


@dataclass(frozen=True, slots=True)
class FlatFactors:
    """One module's factors of several adapters in flat memory.

    ``a`` [*, in] and ``b`` [*, out] are all of it, seen as rows of each of ``FACTOR_TYPES``; adapter i is of type
    ``types[i]`` and has ``ranks[i]`` of them (0: nothing for this module) from ``a_rows[i]`` and ``b_rows[i]`` on.
    Modules with the same input share ``a``.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    types: Ints
    ranks: Ints
    scales: Floats
    a_rows: Ints
    b_rows: Ints

    def b_of(self, adapter: int) -> Tensor:
        """An adapter's b, transposed [rank, out], in fp32."""
        first = int(self.b_rows[adapter])
        return self.b[int(self.types[adapter])][first : first + int(self.ranks[adapter])].float()


@dataclass(frozen=True, slots=True)
class PagedFactors:
    """One module's factors of several adapters in pages.

    ``pool`` [pages, P] are all of a layer's numbers; ``tables`` int32 [adapters, M] the pages of each adapter, in which
    its numbers lie end to end: a [rank, in] from ``a_starts[i]`` on, b transposed [rank, out] from ``b_starts[i]`` on.
    """

    pool: Tensor
    tables: Tensor
    ranks: Ints
    scales: Floats
    a_starts: Ints
    b_starts: Ints


class LoraBackend(Protocol):
    """What a module named in ``BACKENDS`` offers."""

    def add_paged(self, y: Tensor, x: Tensor, groups: RowGroups, factors: PagedFactors) -> None:
        """See ``add_paged``."""


def group_rows(spans: Sequence[tuple[int, int, int]], *, few: int = _FEW) -> RowGroups:
    """Group rows by adapter. ``spans``: (first row, rows, adapter) in the order of rows, those without one left out."""
    long = [(adapter, first, first + count) for first, count, adapter in spans if count >= few]
    short = [span for span in spans if span[1] < few]
    lengths = [count for _, count, _ in short]
    rows = np.repeat([first for first, _, _ in short], lengths).astype(np.int64) + _steps(np.array(lengths, np.int64))
    owners = np.repeat([adapter for _, _, adapter in short], lengths).astype(np.int64)
    counts = np.bincount(owners)
    large = np.flatnonzero(counts >= few)
    keys = np.full(len(counts), len(large))
    if np.count_nonzero(counts) - len(large) < _DISTINCT * counts[counts < few].sum():
        keys += np.arange(len(counts))
    keys[large] = np.arange(len(large))
    places = np.argsort(keys[owners], kind="stable")
    stops = np.cumsum(counts[large]).tolist()
    many = list(zip(large.tolist(), [0, *stops], stops, strict=False))
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = [0, *breaks.tolist()] if len(rows) else []
    runs = [
        (int(rows[start]), start, stop - start) for start, stop in zip(starts, [*starts[1:], len(rows)], strict=False)
    ]
    in_place = bool((places == np.arange(len(places))).all())
    back = None if in_place else torch.from_numpy(np.argsort(places, kind="stable"))
    first_few = stops[-1] if stops else 0
    return RowGroups(long, torch.from_numpy(rows[places]), many, owners[places][first_few:], runs, back)


def _steps(lengths: Ints) -> Ints:
    """0, 1, .. for each of several lengths, one after the other."""
    steps: Ints = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return steps


class FlatProduct:
    """What adapters add to one product of the base model, whose parts are the outputs of some modules, on the CPU.

    Sums are fp32, and factors are read where they are. Two compiled kernels do all of it; without those, an adapter's
    few rows cost one pass over its factors, all adapters together two calls a module, and where an adapter has many
    rows it has products of its own. What kernels want to know of rows and factors is worked out once.
    """

    def __init__(self, groups: RowGroups, modules: Sequence[FlatFactors]) -> None:
        self._groups = groups
        self._modules = modules
        self._tasks: _Tasks | None = None

    def add(self, outputs: Sequence[Tensor], x: Tensor) -> None:
        """Add to the rows of every output [T, out_i] what the adapters of module i make of those of x [T, in].

        Outputs are of x's type and parts of one tensor.
        """
        if native.serves(x, *outputs):
            if self._tasks is None:
                self._tasks = _compiled().Tasks(self._groups.by_adapter(), self._modules)
            self._tasks.add(outputs, x)
            return
        wide = [y.float() for y in outputs]
        _add_wide(wide, x.float(), self._groups, self._modules)
        for y, result in zip(outputs, wide, strict=True):
            if result is not y:
                y.copy_(result)


class _Tasks(Protocol):
    def add(self, outputs: Sequence[Tensor], x: Tensor) -> None:
        """Add to rows of every output what their adapters make of those of x."""


class _Compiled(Protocol):
    """What ``kernels.lora_numba`` offers."""

    def Tasks(self, rows: ByAdapter, modules: Sequence[FlatFactors]) -> _Tasks:  # noqa: N802  a class
        """The work for rows and the modules that they share."""

    def reads(self, stored: torch.dtype) -> bool:
        """Whether factors may be of this type."""


@functools.cache
def _compiled() -> _Compiled:
    module: Any = importlib.import_module(COMPILED)
    return cast(_Compiled, module)


def _add_wide(outputs: Sequence[Tensor], x: Tensor, groups: RowGroups, modules: Sequence[FlatFactors]) -> None:
    """The same by torch's operations, all in fp32: two calls a module for all adapters with few rows."""
    for adapter, first, stop in groups.spans:
        for y, inner, factors in zip(outputs, _inner(x[first:stop], adapter, modules), modules, strict=True):
            y[first:stop].addmm_(inner, factors.b_of(adapter), alpha=float(factors.scales[adapter]))
    if not len(groups.order):
        return
    own = groups.take(x)
    if not groups.many:
        for y, factors in zip(outputs, modules, strict=True):
            groups.give(y, _few(own, groups, factors))
        return
    deltas = [own.new_empty(own.shape[0], y.shape[1]) for y in outputs]
    for adapter, first, stop in groups.many:
        for delta, inner, factors in zip(deltas, _inner(own[first:stop], adapter, modules), modules, strict=True):
            delta[first:stop].addmm_(inner, factors.b_of(adapter), beta=0, alpha=float(factors.scales[adapter]))
    for y, delta, factors in zip(outputs, deltas, modules, strict=True):
        if len(groups.owners):
            delta[groups.first_few :] = _few(own[groups.first_few :], groups, factors)
        groups.give(y, delta)


def _inner(x: Tensor, adapter: int, modules: Sequence[FlatFactors]) -> Sequence[Tensor]:
    """X @ a.T of every module; one product where the factors lie one behind the other."""
    ranks = [int(factors.ranks[adapter]) for factors in modules]
    firsts = [int(factors.a_rows[adapter]) for factors in modules]
    behind = [first + rank for first, rank in zip(firsts, ranks, strict=True)]
    memory = modules[0].a[int(modules[0].types[adapter])]
    if firsts[1:] == behind[:-1]:
        inner: Sequence[Tensor] = (x @ memory[firsts[0] : behind[-1]].float().t()).split(ranks, dim=1)
        return inner
    return [x @ memory[first:stop].float().t() for first, stop in zip(firsts, behind, strict=True)]


def _few(own: Tensor, groups: RowGroups, factors: FlatFactors) -> Tensor:
    """What the adapters of the few rows make of them, [R, out]; all are in fp32."""
    assert not factors.types.any()
    pattern = groups.pattern(factors.ranks)
    _announced()
    wanted = torch.sparse_csr_tensor(
        pattern.starts,
        pattern.columns(factors.a_rows),
        own.new_zeros(len(pattern.steps)),
        size=(own.shape[0], factors.a[0].shape[0]),
        check_invariants=False,
    )
    # only the wanted products of x and a, then sums of the rows of b that they weigh
    inner = torch.sparse.sampled_addmm(wanted, own, factors.a[0].t(), beta=0.0).values()
    inner.mul_(torch.from_numpy(factors.scales[pattern.owners]))
    return functional.embedding_bag(
        pattern.columns(factors.b_rows),
        factors.b[0],
        pattern.starts,
        mode="sum",
        per_sample_weights=inner,
        include_last_offset=True,
    )


@functools.cache
def _announced() -> None:
    """Let torch say once, to nobody, that sparse tensors are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), size=(1, 1))


def add_paged(y: Tensor, x: Tensor, groups: RowGroups, factors: PagedFactors) -> None:
    """The same with factors in pages, in any floating type; sums are fp32 where the device has kernels."""
    if x.device.type in BACKENDS:
        _backend(x.device.type).add_paged(y, x, groups, factors)
    else:
        add_paged_reference(y, x, groups, factors)


def add_paged_reference(y: Tensor, x: Tensor, groups: RowGroups, factors: PagedFactors) -> None:
    """What kernels over pages have to give: an adapter's numbers are laid end to end, then multiplied."""

    def delta(adapter: int, own: Tensor) -> Tensor:
        rank = int(factors.ranks[adapter])
        laid = _laid(factors, adapter).to(x.dtype)
        a = laid[int(factors.a_starts[adapter]) :][: rank * x.shape[1]].view(rank, -1)
        b = laid[int(factors.b_starts[adapter]) :][: rank * y.shape[1]].view(rank, -1)
        return (own @ a.t()).mul_(float(factors.scales[adapter])) @ b

    for adapter, first, stop in groups.spans:
        if factors.ranks[adapter]:
            y[first:stop] += delta(adapter, x[first:stop])
    if not len(groups.order):
        return
    own = groups.take(x)
    deltas = torch.zeros(own.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
    few = groups.first_few
    singles = [(int(adapter), few + place, few + place + 1) for place, adapter in enumerate(groups.owners)]
    for adapter, first, stop in (*groups.many, *singles):
        if factors.ranks[adapter]:
            deltas[first:stop] = delta(adapter, own[first:stop])
    groups.give(y, deltas)


def _laid(factors: PagedFactors, adapter: int) -> Tensor:
    pages = factors.tables[adapter].tolist()
    if pages == list(range(pages[0], pages[0] + len(pages))):
        return factors.pool[pages[0] : pages[0] + len(pages)].view(-1)
    return factors.pool[factors.tables[adapter].long()].view(-1)


@functools.cache
def _backend(device_type: str) -> LoraBackend:
    module: Any = importlib.import_module(BACKENDS[device_type])
    return cast(LoraBackend, module)
