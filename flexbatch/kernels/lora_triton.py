"""Triton kernels that add LoRA's products to rows of many adapters, whose factors lie in pages: shrink, then expand.

A program holds a tile of rows of one adapter (as in Punica's and S-LoRA's multi-size products), and takes every number
of a factor through the adapter's page table, for rows of a factor may straddle pages. A program beyond its adapter's
rank ends at once: ranks are not padded. Sums are fp32.
"""

# ruff: noqa: N803  what a kernel knows when it is compiled stands in capitals, as is usual in Triton

from __future__ import annotations

import numpy as np
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from flexbatch.kernels.lora import PagedFactors, RowGroups

FIRST, COUNT, ADAPTER, RANK, A_START, B_START, INNER = range(7)  # columns of a record
_RANKS, _DEPTH, _WIDTH = 16, 64, 64  # of a tile: inner numbers, numbers of x or of inner ones at a time, outputs


def add_paged(y: Tensor, x: Tensor, groups: RowGroups, factors: PagedFactors) -> None:
    """Add to the rows of y [T, out] what their adapters make of those of x [T, in]; see ``lora.add_paged``.

    Scratch memory: 4 bytes an inner number (a row's rank), and the records.
    """
    order, owners = groups.by_adapter().order, groups.by_adapter().owners
    tile = 16 if len(owners) < 16 * len(np.unique(owners)) else 32
    records, scales, numbers = _records(owners, factors, tile)
    if not len(records):
        return
    device = x.device
    x = x if x.stride(1) == 1 else x.contiguous()
    assert factors.pool.is_contiguous()
    inner = torch.empty(numbers, dtype=torch.float32, device=device)
    rows = torch.from_numpy(order.astype(np.int32)).to(device, non_blocking=True)
    work = torch.from_numpy(records).to(device, non_blocking=True)
    factor = torch.from_numpy(scales).to(device, non_blocking=True)
    exact = "ieee" if x.dtype == torch.float32 else "tf32"
    constants = {"PAGE": factors.pool.shape[1], "FIELDS": records.shape[1], "TILE": tile, "EXACT": exact}
    table = factors.tables
    _shrink_kernel[(len(records), triton.cdiv(int(records[:, RANK].max()), _RANKS))](
        inner,
        x,
        x.stride(0),
        factors.pool,
        table,
        table.stride(0),
        rows,
        work,
        IN=x.shape[1],
        RANKS=_RANKS,
        DEPTH=_DEPTH,
        **constants,
    )
    _expand_kernel[(len(records), triton.cdiv(y.shape[1], _WIDTH))](
        y,
        y.stride(0),
        y.stride(1),
        inner,
        factors.pool,
        table,
        table.stride(0),
        rows,
        work,
        factor,
        OUT=y.shape[1],
        RANKS=_RANKS,
        WIDTH=_WIDTH,
        **constants,
    )


def _records(owners: np.ndarray, factors: PagedFactors, tile: int) -> tuple[np.ndarray, np.ndarray, int]:
    """One record a tile of rows, int32 [W, 7]; the tiles' scales; and how many inner numbers there are in all."""
    records: list[tuple[int, ...]] = []
    scales: list[float] = []
    numbers = place = 0
    while place < len(owners):
        adapter = int(owners[place])
        stop = int(np.searchsorted(owners[place:] != adapter, True)) + place
        rank = int(factors.ranks[adapter])
        for first in range(place, stop, tile):
            count = min(tile, stop - first)
            if rank:
                starts = int(factors.a_starts[adapter]), int(factors.b_starts[adapter])
                records.append((first, count, adapter, rank, *starts, numbers))
                scales.append(float(factors.scales[adapter]))
                numbers += count * rank
        place = stop
    return np.array(records, dtype=np.int32).reshape(-1, 7), np.array(scales, dtype=np.float32), numbers


@triton.jit  # type: ignore[untyped-decorator]
def _paged(pool: tl.tensor, table: tl.tensor, number: tl.tensor, mask: tl.tensor, PAGE: tl.constexpr) -> tl.tensor:
    page = tl.load(table + number // PAGE, mask=mask, other=0).to(tl.int64)
    return tl.load(pool + page * PAGE + number % PAGE, mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _shrink_kernel(
    inner: tl.tensor,
    x: tl.tensor,
    x_stride: int,
    pool: tl.tensor,
    tables: tl.tensor,
    table_stride: int,
    rows: tl.tensor,
    records: tl.tensor,
    IN: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    record = records + tl.program_id(0) * FIELDS
    rank = tl.load(record + 3)
    if tl.program_id(1) * RANKS < rank:
        first, count = tl.load(record), tl.load(record + 1)
        table = tables + tl.load(record + 2) * table_stride
        start, target = tl.load(record + 4), tl.load(record + 6)
        places = tl.arange(0, TILE)
        own = tl.load(rows + first + places, mask=places < count, other=0).to(tl.int64)
        ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
        total = tl.zeros((TILE, RANKS), dtype=tl.float32)
        for begin in range(0, IN, DEPTH):
            depth = begin + tl.arange(0, DEPTH)
            taken = tl.load(
                x + own[:, None] * x_stride + depth[None, :],
                mask=(places < count)[:, None] & (depth < IN)[None, :],
                other=0.0,
            )
            number = start + ranks[None, :] * IN + depth[:, None]
            factor = _paged(pool, table, number, (ranks < rank)[None, :] & (depth < IN)[:, None], PAGE)
            total += tl.dot(taken, factor.to(taken.dtype), input_precision=EXACT)
        tl.store(
            inner + target + places[:, None] * rank + ranks[None, :],
            total,
            mask=(places < count)[:, None] & (ranks < rank)[None, :],
        )


@triton.jit  # type: ignore[untyped-decorator]
def _expand_kernel(
    y: tl.tensor,
    y_row: int,
    y_column: int,
    inner: tl.tensor,
    pool: tl.tensor,
    tables: tl.tensor,
    table_stride: int,
    rows: tl.tensor,
    records: tl.tensor,
    scales: tl.tensor,
    OUT: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    record = records + tl.program_id(0) * FIELDS
    first, count, rank = tl.load(record), tl.load(record + 1), tl.load(record + 3)
    table = tables + tl.load(record + 2) * table_stride
    start, source = tl.load(record + 5), tl.load(record + 6)
    places = tl.arange(0, TILE)
    own = tl.load(rows + first + places, mask=places < count, other=0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    for begin in range(0, rank, RANKS):
        ranks = begin + tl.arange(0, RANKS)
        taken = tl.load(
            inner + source + places[:, None] * rank + ranks[None, :],
            mask=(places < count)[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        number = start + ranks[:, None] * OUT + columns[None, :]
        factor = _paged(pool, table, number, (ranks < rank)[:, None] & (columns < OUT)[None, :], PAGE)
        total += tl.dot(taken.to(y.dtype.element_ty), factor.to(y.dtype.element_ty), input_precision=EXACT)
    target = y + own[:, None] * y_row + columns[None, :] * y_column
    mask = (places < count)[:, None] & (columns < OUT)[None, :]
    sum_ = tl.load(target, mask=mask, other=0.0).to(tl.float32) + total * tl.load(scales + tl.program_id(0))
    tl.store(target, sum_.to(y.dtype.element_ty), mask=mask)
