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

BACKENDS: dict[str, str] = {"cuda": "flexbatch.kernels.lora_triton"}
"""Device type -> the module with its kernels, imported when first used (see ``LoraBackend``)."""

_FEW = 8  # rows of one adapter from which on products of their own are faster than the sparse ones of all adapters

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Rows = slice | Tensor


@dataclass(slots=True)
class RowGroups:
    """The rows of a micro-batch by adapter. ``many``: (adapter, its rows) where it has more than a few of them.

    ``few``: the rows of all other adapters, and ``owners`` the adapter of each. Adapters are numbers from 0.
    """

    many: list[tuple[int, Rows]]
    few: Rows
    owners: Ints
    _patterns: dict[bytes, _Pattern] = field(default_factory=dict)

    def pattern(self, ranks: Ints) -> _Pattern:
        """The places of the few rows' inner numbers, for adapters of these ``ranks`` [adapters]; found once."""
        own = ranks[self.owners]
        key = own.tobytes()
        if key not in self._patterns:
            self._patterns[key] = _Pattern.of(own, self.owners)
        return self._patterns[key]


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
        steps = np.arange(starts[-1]) - np.repeat(starts[:-1], ranks)
        return cls(torch.from_numpy(starts), np.repeat(owners, ranks), steps)

    def columns(self, firsts: Ints) -> Tensor:
        """Rows of a matrix of factors, int64 [N], where those of each adapter begin at ``firsts`` [adapters]."""
        return torch.from_numpy(firsts[self.owners] + self.steps)


@dataclass(frozen=True, slots=True)
class FlatFactors:
    """One module's factors of several adapters in flat memory.

    ``a`` [*, in] and ``b`` [*, out] are all of it, seen as rows; adapter i has ``ranks[i]`` of them (0: nothing for
    this module) from ``a_rows[i]`` and ``b_rows[i]`` on.
    """

    a: Tensor
    b: Tensor
    ranks: Ints
    scales: Floats
    a_rows: Ints
    b_rows: Ints


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
    by_adapter: dict[int, list[tuple[int, int]]] = {}
    for first, count, adapter in spans:
        by_adapter.setdefault(adapter, []).append((first, count))
    many: list[tuple[int, Rows]] = []
    rows: list[int] = []
    owners: list[int] = []
    for adapter, own in by_adapter.items():
        if sum(count for _, count in own) >= few:
            many.append((adapter, _rows([row for first, count in own for row in range(first, first + count)])))
    busy = {adapter for adapter, _ in many}
    for first, count, adapter in spans:
        if adapter not in busy:
            rows += range(first, first + count)
            owners += [adapter] * count
    return RowGroups(many, _rows(rows), np.array(owners, dtype=np.int64))


def add_flat(y: Tensor, x: Tensor, groups: RowGroups, factors: FlatFactors) -> None:
    """Add to the rows of y [T, out] what their adapters make of those of x [T, in], in place.

    Both are fp32 on the CPU. Factors are read where they are: an adapter's few rows cost one pass over its factors,
    all adapters together two calls; where it has many rows, two products of its own.
    """
    for adapter, rows in groups.many:
        rank = int(factors.ranks[adapter])
        if rank:
            a = factors.a[int(factors.a_rows[adapter]) :][:rank]
            b = factors.b[int(factors.b_rows[adapter]) :][:rank]
            _add_dense(y, x, rows, a, b, float(factors.scales[adapter]))
    if not len(groups.owners):
        return
    pattern = groups.pattern(factors.ranks)
    if not len(pattern.steps):
        return
    own = _taken(x, groups.few)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors announce that they are new
        wanted = torch.sparse_csr_tensor(
            pattern.starts,
            pattern.columns(factors.a_rows),
            torch.zeros(len(pattern.steps)),
            size=(own.shape[0], factors.a.shape[0]),
            check_invariants=False,
        )
    # only the wanted products of x and a, then sums of the rows of b that they weigh
    inner = torch.sparse.sampled_addmm(wanted, own, factors.a.t(), beta=0.0).values()
    inner.mul_(torch.from_numpy(factors.scales[pattern.owners]))
    delta = functional.embedding_bag(
        pattern.columns(factors.b_rows),
        factors.b,
        pattern.starts,
        mode="sum",
        per_sample_weights=inner,
        include_last_offset=True,
    )
    _add_to(y, groups.few, delta)


def add_paged(y: Tensor, x: Tensor, groups: RowGroups, factors: PagedFactors) -> None:
    """The same with factors in pages, in any floating type; sums are fp32 where the device has kernels."""
    if x.device.type in BACKENDS:
        _backend(x.device.type).add_paged(y, x, groups, factors)
    else:
        add_paged_reference(y, x, groups, factors)


def add_paged_reference(y: Tensor, x: Tensor, groups: RowGroups, factors: PagedFactors) -> None:
    """What kernels over pages have to give: an adapter's numbers are laid end to end, then multiplied."""
    for adapter, rows in (*groups.many, *_singles(groups)):
        rank = int(factors.ranks[adapter])
        if not rank:
            continue
        laid = _laid(factors, adapter).to(x.dtype)
        a = laid[int(factors.a_starts[adapter]) :][: rank * x.shape[1]].view(rank, -1)
        b = laid[int(factors.b_starts[adapter]) :][: rank * y.shape[1]].view(rank, -1)
        _add_dense(y, x, rows, a, b, float(factors.scales[adapter]))


def _singles(groups: RowGroups) -> list[tuple[int, Rows]]:
    numbers = np.arange(groups.few.start, groups.few.stop) if isinstance(groups.few, slice) else groups.few.numpy()
    return [(int(adapter), torch.from_numpy(numbers[groups.owners == adapter])) for adapter in np.unique(groups.owners)]


def _laid(factors: PagedFactors, adapter: int) -> Tensor:
    pages = factors.tables[adapter].tolist()
    if pages == list(range(pages[0], pages[0] + len(pages))):
        return factors.pool[pages[0] : pages[0] + len(pages)].view(-1)
    return factors.pool[factors.tables[adapter].long()].view(-1)


def _add_dense(y: Tensor, x: Tensor, rows: Rows, a: Tensor, b: Tensor, scale: float) -> None:
    inner = _taken(x, rows) @ a.t()
    if isinstance(rows, slice):
        y[rows].addmm_(inner, b, alpha=scale)
    else:
        _add_to(y, rows, inner.mul_(scale) @ b)


def _add_to(y: Tensor, rows: Rows, delta: Tensor) -> None:
    if isinstance(rows, slice):
        y[rows].add_(delta)
    else:
        y.index_add_(0, rows.to(y.device), delta)


def _taken(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows.to(x.device))


def _rows(numbers: list[int]) -> Rows:
    """A run of rows as a slice, which reads and writes in place."""
    if numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return torch.tensor(numbers, dtype=torch.int64)


@functools.cache
def _backend(device_type: str) -> LoraBackend:
    module: Any = importlib.import_module(BACKENDS[device_type])
    return cast(LoraBackend, module)
