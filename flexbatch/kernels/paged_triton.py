"""Triton kernels over the paged KV pool: attention of ragged queries, and the store of keys and values.

One attention kernel serves prompt chunks and decoding rows: a program holds a tile of queries of one KV head, all heads
of its group together, and walks over keys as FlashAttention does (Dao et al., 2022). A decoding row's keys are cut into
partitions that a second kernel merges (Flash-Decoding, Dao et al., 2023). Knows nothing of sequences; sums are fp32.
"""

# ruff: noqa: N803, N806  what a kernel knows when it is compiled stands in capitals, as is usual in Triton

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from flexbatch.kernels.paged import PagedQueries

_LOG2_E = 1.4426950408889634
_STORE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Tile:
    """How an attention program is cut: query rows, keys a turn, warps, and stages of its pipeline of loads."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_for(*, longest: int, group: int, dim: int, page_tokens: int, dtype: torch.dtype) -> Tile:
    """Return a tile that fits the shared memory that a program has, from Turing's 64 KiB on.

    ``longest`` is the most queries of a sequence. Keys of one turn lie in one page where pages allow it.
    """
    width = _padded(dim)
    wide = width > 128
    full = dtype == torch.float32
    rows = min(32 if full or wide else 64, triton.next_power_of_2(longest * group))
    keys = 16 if full and wide else 32 if full or wide else 64
    if page_tokens >= 16 and page_tokens & (page_tokens - 1) == 0:
        keys = min(keys, page_tokens)
    return Tile(max(16, triton.next_power_of_2(group), rows), keys, warps=4, stages=1 if full and wide else 2)


def attend(
    out: Tensor, queries: PagedQueries, layer: Tensor, q: Tensor, scale: float, tile: Tile | None = None
) -> None:
    """Write the attention of ``queries`` to their rows of ``out`` [T, heads, D]; see ``paged.attend_paged``."""
    heads, dim = q.shape[1:]
    kv_heads, size = layer.shape[1], layer.shape[3]
    q = q if q.stride(2) == 1 else q.contiguous()
    assert layer[0].is_contiguous()
    assert layer.dtype == q.dtype
    group = heads // kv_heads
    tile = tile or tile_for(longest=queries.longest, group=group, dim=dim, page_tokens=size, dtype=q.dtype)
    assert queries.partition % tile.keys == 0
    split = queries.longest == 1 and queries.partitions > 1
    # partial sums [slots, heads, D], then highest scores and totals [slots, heads] each
    numbers = queries.slots * heads if split else 0
    scratch = torch.empty(numbers * (dim + 2), dtype=torch.float32, device=q.device)
    partial, highest, total = scratch.split([numbers * dim, numbers, numbers])
    window = queries.window or 0
    sequences = queries.records.shape[0]
    third = queries.partitions if split else triton.cdiv(queries.longest, tile.rows // group)
    _attend_kernel[(sequences, kv_heads, third)](
        out,
        partial,
        highest,
        total,
        q,
        layer,
        queries.records,
        queries.records.stride(0),
        q.stride(0),
        q.stride(1),
        layer.stride(0),
        scale * _LOG2_E,
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        WIDTH=_padded(dim),
        PAGE=size,
        WINDOW=window,
        PARTITION=queries.partition,
        SPLIT=split,
        ROWS=tile.rows,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    if split:
        merge_partitions(out, queries, partial, highest, total)


def merge_partitions(
    out: Tensor, queries: PagedQueries, partial: Tensor, highest: Tensor, total: Tensor, logs: Tensor | None = None
) -> None:
    """Merge what the partitions of decoding rows gave into their rows of ``out`` [T, heads, D].

    ``logs`` [T, heads]: for the logarithms of the sums.
    """
    heads, dim = out.shape[1:]
    _merge_kernel[(queries.records.shape[0], heads)](
        out,
        partial,
        highest,
        total,
        total if logs is None else logs,
        queries.records,
        queries.records.stride(0),
        HEADS=heads,
        DIM=dim,
        WIDTH=_padded(dim),
        LOGS=logs is not None,
        WINDOW=queries.window or 0,
        PARTITION=queries.partition,
        num_warps=1,
        enable_fp_fusion=True,
    )


def store(layer: Tensor, pages: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k and v [T, kv_heads, D] to their pages and offsets (int64 [T]) in ``layer`` [pages, kv_heads, 2, P, D]."""
    tokens, kv_heads, dim = k.shape
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    assert layer[0].is_contiguous()
    block = min(_STORE_BLOCK, triton.next_power_of_2(kv_heads * dim))
    _store_kernel[(tokens, triton.cdiv(kv_heads * dim, block))](
        layer,
        k,
        v,
        pages,
        offsets,
        layer.stride(0),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        KV_HEADS=kv_heads,
        DIM=dim,
        PAGE=layer.shape[3],
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _padded(dim: int) -> int:
    """The width of a tile that holds ``dim`` numbers: a power of two that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(dim)))


@triton.jit(do_not_specialize=["record_stride"])  # type: ignore[untyped-decorator]
def _attend_kernel(
    out: tl.tensor,
    partial: tl.tensor,
    highest_of: tl.tensor,
    total_of: tl.tensor,
    q: tl.tensor,
    layer: tl.tensor,
    records: tl.tensor,
    record_stride: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    page_stride: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTITION: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    TOKENS: tl.constexpr = ROWS // GROUP
    record = records + tl.program_id(0).to(tl.int64) * record_stride
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    first_row = tl.load(record)
    start = tl.load(record + 1)
    count = tl.load(record + 2)
    tile = 0 if SPLIT else part
    first = tile * TOKENS  # the tile's first query, counted within its sequence
    if first >= count:
        return
    lowest = start * 0
    if WINDOW > 0:
        lowest = tl.maximum(start + first - WINDOW + 1, 0)
    stop = start + tl.minimum(count, first + TOKENS)
    if SPLIT:
        area = lowest // PARTITION + part
        if area * PARTITION >= stop:
            return
        lowest = tl.maximum(lowest, area * PARTITION)
        stop = tl.minimum(stop, (area + 1) * PARTITION)

    lane = tl.arange(0, ROWS)
    token = first + lane // GROUP
    real = (lane < TOKENS * GROUP) & (token < count)
    position = start + token
    head = kv_head * GROUP + lane % GROUP
    dims = tl.arange(0, WIDTH)
    inner = dims < DIM
    row = (first_row + token).to(tl.int64)
    query = tl.load(
        q + (row * q_token + head * q_head)[:, None] + dims[None, :], mask=real[:, None] & inner[None, :], other=0.0
    )
    pool = layer + kv_head * (2 * PAGE * DIM)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, WIDTH], tl.float32)
    places = tl.arange(0, KEYS)
    for base in range(lowest // KEYS * KEYS, stop, KEYS):
        keys = base + places
        known = keys < stop
        if PAGE % KEYS == 0:  # the keys of a turn lie in one page
            page = tl.load(record + 4 + base // PAGE).to(tl.int64)
            at = page * page_stride + (base % PAGE + places) * DIM
        else:
            page = tl.load(record + 4 + keys // PAGE, mask=known, other=0).to(tl.int64)
            at = page * page_stride + (keys % PAGE) * DIM
        k = tl.load(pool + at[None, :] + dims[:, None], mask=known[None, :] & inner[:, None], other=0.0)
        scores = tl.dot(query, k, input_precision="ieee") * scale
        visible = known[None, :] & (keys[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (keys[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing visible yet: no inf - inf
        weights = tl.exp2(scores - finite[:, None])
        factor = tl.exp2(highest - finite)
        total = total * factor + tl.sum(weights, 1)
        # Unwritten places are read as zeros, since 0 times a NaN is a NaN.
        v = tl.load(pool + PAGE * DIM + at[:, None] + dims[None, :], mask=known[:, None] & inner[None, :], other=0.0)
        attended = attended * factor[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher

    if SPLIT:
        slot = (tl.load(record + 3) + part).to(tl.int64) * HEADS + head
        tl.store(highest_of + slot, highest, mask=real)
        tl.store(total_of + slot, total, mask=real)
        tl.store(partial + slot[:, None] * DIM + dims[None, :], attended, mask=real[:, None] & inner[None, :])
    else:
        result = attended / tl.where(total > 0, total, 1.0)[:, None]
        target = out + (row * HEADS + head)[:, None] * DIM + dims[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=real[:, None] & inner[None, :])


@triton.jit(do_not_specialize=["record_stride"])  # type: ignore[untyped-decorator]
def _merge_kernel(
    out: tl.tensor,
    partial: tl.tensor,
    highest_of: tl.tensor,
    total_of: tl.tensor,
    logs: tl.tensor,
    records: tl.tensor,
    record_stride: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    LOGS: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTITION: tl.constexpr,
) -> None:
    record = records + tl.program_id(0).to(tl.int64) * record_stride
    head = tl.program_id(1)
    row = tl.load(record).to(tl.int64)
    stop = tl.load(record + 1) + 1
    lowest = stop * 0
    if WINDOW > 0:
        lowest = tl.maximum(stop - WINDOW, 0)
    parts = (stop + PARTITION - 1) // PARTITION - lowest // PARTITION
    slot = tl.load(record + 3).to(tl.int64) * HEADS + head
    dims = tl.arange(0, WIDTH)
    inner = dims < DIM
    highest = tl.load(highest_of + slot)
    total = tl.load(total_of + slot)
    attended = tl.load(partial + slot * DIM + dims, mask=inner, other=0.0)
    for part in range(1, parts):
        place = slot + part * HEADS
        other = tl.load(highest_of + place)
        higher = tl.maximum(highest, other)  # every partition has a visible key, so both are finite
        ours = tl.exp2(highest - higher)
        theirs = tl.exp2(other - higher)
        total = total * ours + tl.load(total_of + place) * theirs
        attended = attended * ours + tl.load(partial + place * DIM + dims, mask=inner, other=0.0) * theirs
        highest = higher
    tl.store(out + (row * HEADS + head) * DIM + dims, (attended / total).to(out.dtype.element_ty), mask=inner)
    if LOGS:
        tl.store(logs + row * HEADS + head, (highest + tl.log2(total)) * 0.6931471805599453)


@triton.jit  # type: ignore[untyped-decorator]
def _store_kernel(
    layer: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    pages: tl.tensor,
    offsets: tl.tensor,
    page_stride: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = number < KV_HEADS * DIM
    head = number // DIM
    dim = number % DIM
    page = tl.load(pages + token).to(tl.int64)
    offset = tl.load(offsets + token)
    target = layer + page * page_stride + head * (2 * PAGE * DIM) + offset * DIM + dim
    key = tl.load(k + token * k_token + head * k_head + dim, mask=real)
    value = tl.load(v + token * v_token + head * v_head + dim, mask=real)
    tl.store(target, key, mask=real)
    tl.store(target + PAGE * DIM, value, mask=real)
