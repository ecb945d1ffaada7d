"""Triton kernels over packed KV pages: attention that unpacks keys and values in registers, and quantize-on-store.

The walk over keys, partitions and their merge are those of ``paged_triton``; the numbers, those of ``kv4``. The lower
and the upper nibbles of a byte are even and odd channels, and are kept in tiles of their own: nothing is interleaved.
"""

# ruff: noqa: N803, N806  what a kernel knows when it is compiled stands in capitals, as is usual in Triton

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from flexbatch.kernels.kv4 import Meeting, page_tokens_of
from flexbatch.kernels.kv4_basis import Basis
from flexbatch.kernels.paged import PagedQueries
from flexbatch.kernels.paged_triton import Tile, merge_partitions, tile_for
from flexbatch.policy.footprint import kv_group, kv_head_bytes

_LOG2_E = 1.4426950408889634
_STORE_ROWS = 16  # tokens of which one program quantizes a group


def attend(
    out: Tensor,
    logs: Tensor,
    queries: PagedQueries,
    layer: Tensor,
    meeting: Meeting,
    scale: float,
    tile: Tile | None = None,
) -> None:
    """Write the attention of ``queries`` to their rows of ``out`` [T, heads, D]; see ``kv4.attend_packed``.

    To ``logs`` fp32 [T, heads] the logarithms of the sums. layer uint8 [pages, kv_heads, 2, area]; cosines and sines
    are rounded to the type of the queries.
    """
    q = meeting.q.contiguous()
    turns = None if meeting.turns is None else meeting.turns.to(q.dtype)
    heads, dim = q.shape[1:]
    kv_heads, size = layer.shape[1], page_tokens_of(layer, dim)
    assert layer[0].is_contiguous()
    group = heads // kv_heads
    tile = tile or tile_for(longest=queries.longest, group=group, dim=dim, page_tokens=size, dtype=q.dtype)
    assert queries.partition % tile.keys == 0
    split = queries.longest == 1 and queries.partitions > 1
    # partial sums [slots, heads, D], then highest scores and totals [slots, heads] each
    numbers = queries.slots * heads if split else 0
    scratch = torch.empty(numbers * (dim + 2), dtype=torch.float32, device=q.device)
    partial, highest, total = scratch.split([numbers * dim, numbers, numbers])
    sequences = queries.records.shape[0]
    third = queries.partitions if split else triton.cdiv(queries.longest, tile.rows // group)
    _attend_kernel[(sequences, kv_heads, third)](
        out,
        logs,
        partial,
        highest,
        total,
        q,
        q if meeting.means is None else meeting.means.contiguous(),
        q if turns is None else turns.contiguous(),
        meeting.basis.first_keys,
        meeting.basis.first_values,
        layer,
        queries.records,
        queries.records.stride(0),
        layer.stride(0),
        scale * _LOG2_E,
        HEADS=heads,
        GROUP=group,
        **packed_constants(dim),
        PAGE=size,
        AREA=layer.shape[3],
        TURNS=turns is not None,
        WINDOW=queries.window or 0,
        PARTITION=queries.partition,
        SPLIT=split,
        ROWS=tile.rows,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    if split:
        merge_partitions(out, queries, partial, highest, total, logs)


def store(layer: Tensor, pages: Tensor, offsets: Tensor, keys: Tensor, values: Tensor, basis: Basis) -> None:
    """Quantize keys and values [T, kv_heads, D] into ``layer`` at their pages and offsets (int64 [T]); see ``kv4``.

    Numbers are those of ``kv4.pack_rows`` but for ties between codes, which rounding decides.
    """
    tokens, kv_heads, dim = keys.shape
    row = kv_head_bytes(dim)
    assert layer[0].is_contiguous()
    half = kv_group(dim) // 2
    groups = dim // kv_group(dim)
    grid = (triton.cdiv(tokens, _STORE_ROWS), kv_heads * groups)
    for place, (x, feedback) in enumerate(((keys, basis.key_feedback), (values, basis.value_feedback))):
        x = x if x.stride(2) == 1 else x.contiguous()
        _store_kernel[grid](
            layer,
            x,
            feedback,
            pages,
            offsets,
            tokens,
            layer.stride(0),
            x.stride(0),
            x.stride(1),
            GROUPS=groups,
            HALF=half,
            WIDTH=max(16, triton.next_power_of_2(half)),
            ROW=row,
            AREA=layer.shape[3],
            PLACE=place,
            ROWS=_STORE_ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )


def packed_constants(dim: int) -> dict[str, int]:
    """What the kernels know of a packed head of ``dim`` numbers when they are compiled."""
    group = kv_group(dim)
    groups = dim // group
    half = group // 2
    # Several groups are 64 wide each, so tiles of them have no gaps; one may have any width.
    padded = triton.next_power_of_2(groups) if groups > 1 else 1
    width = padded * half if groups > 1 else max(16, triton.next_power_of_2(half))
    return {
        "DIM": dim,
        "HALF": half,
        "GROUPS": groups,
        "PADDED": padded,
        "WIDTH": width,
        "ROW": groups * (half + 4),
    }


@triton.jit  # type: ignore[untyped-decorator]
def _half_at(pointers: tl.tensor, known: tl.tensor) -> tl.tensor:
    """The fp16 numbers at any byte addresses, as fp32; 0 where not ``known``."""
    low = tl.load(pointers, mask=known, other=0).to(tl.uint16)
    high = tl.load(pointers + 1, mask=known, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _scales_at(
    rows: tl.tensor,
    known: tl.tensor,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    AT: tl.constexpr,
) -> tl.tensor:
    """The scale (AT 0) or minimum (AT 2) of every byte of codes of ``rows`` [KEYS, WIDTH]; [KEYS, 1] of one group."""
    if GROUPS == 1:
        found = _half_at(rows + HALF + AT, known)[:, None]
    else:
        groups = tl.arange(0, PADDED)
        real = known[:, None] & (groups[None, :] < GROUPS)
        each = _half_at(rows[:, None] + groups[None, :] * (HALF + 4) + HALF + AT, real)
        found = tl.reshape(tl.broadcast_to(each[:, :, None], (KEYS, PADDED, HALF)), (KEYS, WIDTH))
    return found


@triton.jit(do_not_specialize=["record_stride"])  # type: ignore[untyped-decorator]
def _attend_kernel(
    out: tl.tensor,
    logs: tl.tensor,
    partial: tl.tensor,
    highest_of: tl.tensor,
    total_of: tl.tensor,
    q: tl.tensor,
    means: tl.tensor,
    turns: tl.tensor,
    first_keys: tl.tensor,
    first_values: tl.tensor,
    layer: tl.tensor,
    records: tl.tensor,
    record_stride: tl.tensor,
    page_stride: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    AREA: tl.constexpr,
    TURNS: tl.constexpr,
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
    pair = tl.arange(0, WIDTH)  # of an even channel and the odd one behind it
    inner = pair < DIM // 2
    code = pair // HALF * (HALF + 4) + pair % HALF  # where its byte lies in a row
    row = (first_row + token).to(tl.int64)
    wanted = real[:, None] & inner[None, :]
    query = (row * HEADS + head)[:, None] * DIM + 2 * pair[None, :]
    even_query = tl.load(q + query, mask=wanted, other=0.0)
    odd_query = tl.load(q + query + 1, mask=wanted, other=0.0)
    if TURNS:
        even_mean = tl.load(means + query, mask=wanted, other=0.0)
        odd_mean = tl.load(means + query + 1, mask=wanted, other=0.0)
    special = kv_head * DIM + 2 * pair
    even_first_key = tl.load(first_keys + special, mask=inner, other=0.0)
    odd_first_key = tl.load(first_keys + special + 1, mask=inner, other=0.0)
    even_first_value = tl.load(first_values + special, mask=inner, other=0.0)
    odd_first_value = tl.load(first_values + special + 1, mask=inner, other=0.0)
    pool = layer + kv_head * (2 * AREA)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    even = tl.zeros([ROWS, WIDTH], tl.float32)
    odd = tl.zeros([ROWS, WIDTH], tl.float32)
    places = tl.arange(0, KEYS)
    for base in range(lowest // KEYS * KEYS, stop, KEYS):
        keys = base + places
        known = keys < stop
        if PAGE % KEYS == 0:  # the keys of a turn lie in one page
            page = tl.load(record + 4 + base // PAGE).to(tl.int64)
            at = page * page_stride + (base % PAGE + places) * ROW
        else:
            page = tl.load(record + 4 + keys // PAGE, mask=known, other=0).to(tl.int64)
            at = page * page_stride + (keys % PAGE) * ROW
        rows = pool + at
        stored = known[:, None] & inner[None, :]
        codes = tl.load(rows[:, None] + code[None, :], mask=stored, other=0)
        step = _scales_at(rows, known, HALF, GROUPS, PADDED, WIDTH, KEYS, 0)
        least = _scales_at(rows, known, HALF, GROUPS, PADDED, WIDTH, KEYS, 2)
        opening = tl.where(keys == 0, 1.0, 0.0)[:, None]
        even_key = (codes & 15).to(tl.float32) * step + least + opening * even_first_key[None, :]
        odd_key = (codes >> 4).to(tl.float32) * step + least + opening * odd_first_key[None, :]
        scores = tl.dot(even_query, tl.trans(even_key.to(even_query.dtype)), input_precision="ieee")
        scores = tl.dot(odd_query, tl.trans(odd_key.to(even_query.dtype)), scores, input_precision="ieee")
        if TURNS:
            angle = turns + keys[:, None] * DIM + 2 * pair[None, :]
            even_turn = tl.load(angle, mask=stored, other=0.0)
            odd_turn = tl.load(angle + 1, mask=stored, other=0.0)
            scores = tl.dot(even_mean, tl.trans(even_turn), scores, input_precision="ieee")
            scores = tl.dot(odd_mean, tl.trans(odd_turn), scores, input_precision="ieee")
        scores = scores * scale
        visible = known[None, :] & (keys[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (keys[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing visible yet: no inf - inf
        weights = tl.exp2(scores - finite[:, None])
        factor = tl.exp2(highest - finite)
        total = total * factor + tl.sum(weights, 1)
        rows = rows + AREA
        codes = tl.load(rows[:, None] + code[None, :], mask=stored, other=0)
        step = _scales_at(rows, known, HALF, GROUPS, PADDED, WIDTH, KEYS, 0)
        least = _scales_at(rows, known, HALF, GROUPS, PADDED, WIDTH, KEYS, 2)
        even_value = (codes & 15).to(tl.float32) * step + least + opening * even_first_value[None, :]
        odd_value = (codes >> 4).to(tl.float32) * step + least + opening * odd_first_value[None, :]
        weights = weights.to(even_query.dtype)
        even = even * factor[:, None] + tl.dot(weights, even_value.to(even_query.dtype), input_precision="ieee")
        odd = odd * factor[:, None] + tl.dot(weights, odd_value.to(even_query.dtype), input_precision="ieee")
        highest = higher

    if SPLIT:
        slot = (tl.load(record + 3) + part).to(tl.int64) * HEADS + head
        tl.store(highest_of + slot, highest, mask=real)
        tl.store(total_of + slot, total, mask=real)
        target = partial + slot[:, None] * DIM + 2 * pair[None, :]
        tl.store(target, even, mask=wanted)
        tl.store(target + 1, odd, mask=wanted)
    else:
        whole = tl.where(total > 0, total, 1.0)[:, None]
        target = out + (row * HEADS + head)[:, None] * DIM + 2 * pair[None, :]
        tl.store(target, (even / whole).to(out.dtype.element_ty), mask=wanted)
        tl.store(target + 1, (odd / whole).to(out.dtype.element_ty), mask=wanted)
        sums = (highest + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453
        tl.store(logs + row * HEADS + head, sums, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _codes(x: tl.tensor, scale: tl.tensor, minimum: tl.tensor) -> tl.tensor:
    """Codes 0 .. 15 as fp32, of the nearest step, even where two are as near; 0 where the scale is 0."""
    inverse = tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))
    place = tl.minimum(tl.maximum((x - minimum) * inverse, 0.0), 15.0)
    return (place + 12582912.0) - 12582912.0  # fp32 has no fractions there


@triton.jit  # type: ignore[untyped-decorator]
def _fed_back(
    even: tl.tensor, odd: tl.tensor, inner: tl.tensor, scale: tl.tensor, minimum: tl.tensor, feedback: tl.tensor
) -> tl.tensor:
    """The odd channels with what the errors of the even ones ask for."""
    error = tl.where(inner, _codes(even, scale, minimum) * scale + minimum - even, 0.0)
    return odd + tl.dot(error, feedback, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _error(
    even: tl.tensor, odd: tl.tensor, inner: tl.tensor, scale: tl.tensor, minimum: tl.tensor, feedback: tl.tensor
) -> tl.tensor:
    """The squared error of each row on its grid."""
    target = _fed_back(even, odd, inner, scale, minimum, feedback)
    first = _codes(even, scale, minimum) * scale + minimum - even
    second = _codes(target, scale, minimum) * scale + minimum - target
    return tl.sum(tl.where(inner, first * first + second * second, 0.0), 1)[:, None]


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _store_kernel(
    layer: tl.tensor,
    x: tl.tensor,
    feedbacks: tl.tensor,
    pages: tl.tensor,
    offsets: tl.tensor,
    tokens: tl.tensor,
    page_stride: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    AREA: tl.constexpr,
    PLACE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    group = tl.program_id(1) % GROUPS
    head = tl.program_id(1) // GROUPS
    pair = tl.arange(0, WIDTH)
    inner = (pair < HALF)[None, :]
    wanted = real[:, None] & inner
    place = tl.program_id(1) * (HALF * HALF) + pair[:, None] * HALF + pair[None, :]
    feedback = tl.load(feedbacks + place, mask=(pair < HALF)[:, None] & inner, other=0.0)
    source = x + (token * x_token + head * x_head + group * (2 * HALF))[:, None] + 2 * pair[None, :]
    even = tl.load(source, mask=wanted, other=0.0).to(tl.float32)
    odd = tl.load(source + 1, mask=wanted, other=0.0).to(tl.float32)
    # What is no number stays none: minimum and maximum would drop it.
    even = tl.where(even > 65504.0, 65504.0, tl.where(even < -65504.0, -65504.0, even))
    odd = tl.where(odd > 65504.0, 65504.0, tl.where(odd < -65504.0, -65504.0, odd))

    lowest = tl.min(tl.where(inner, tl.minimum(even, odd), float("inf")), 1)[:, None]
    top = tl.max(tl.where(inner, tl.maximum(even, odd), float("-inf")), 1)[:, None]
    width = top - lowest
    best = tl.full([ROWS, 1], float("inf"), tl.float32)
    scales = tl.full([ROWS, 1], float("inf"), tl.float32)
    minimums = tl.full([ROWS, 1], float("inf"), tl.float32)
    for turn in tl.static_range(9):
        scale = (width * ((1.0 - 0.05 * (turn // 3) - 0.05 * (turn % 3)) / 15.0)).to(tl.float16).to(tl.float32)
        minimum = (lowest + width * (0.05 * (turn // 3))).to(tl.float16).to(tl.float32)
        error = _error(even, odd, inner, scale, minimum, feedback)
        better = error < best
        best = tl.where(better, error, best)
        scales = tl.where(better, scale, scales)
        minimums = tl.where(better, minimum, minimums)

    # The least-squares line through (code, number) of the best.
    first = tl.where(inner, _codes(even, scales, minimums), 0.0)
    target = _fed_back(even, odd, inner, scales, minimums, feedback)
    second = tl.where(inner, _codes(target, scales, minimums), 0.0)
    codes = tl.sum(first + second, 1)[:, None]
    squares = tl.sum(first * first + second * second, 1)[:, None]
    ours = tl.sum(tl.where(inner, even + target, 0.0), 1)[:, None]
    cross = tl.sum(tl.where(inner, first * even + second * target, 0.0), 1)[:, None]
    count = 2.0 * HALF
    spread = count * squares - codes * codes
    flat = spread <= 1e-6 * count * squares
    spread = tl.where(flat, 1.0, spread)
    scale = tl.where(flat, 0.0, (count * cross - codes * ours) / spread)
    minimum = tl.where(flat, ours / count, (ours * squares - codes * cross) / spread)
    scale = scale.to(tl.float16).to(tl.float32)
    minimum = minimum.to(tl.float16).to(tl.float32)
    better = _error(even, odd, inner, scale, minimum, feedback) < best
    scales = tl.where(better, scale, scales)
    minimums = tl.where(better, minimum, minimums)

    page = tl.load(pages + token, mask=real, other=0).to(tl.int64)
    offset = tl.load(offsets + token, mask=real, other=0)
    row = layer + page * page_stride + (head * 2 + PLACE) * AREA + offset * ROW + group * (HALF + 4)
    odd = _fed_back(even, odd, inner, scales, minimums, feedback)
    low = _codes(even, scales, minimums).to(tl.uint8)
    high = _codes(odd, scales, minimums).to(tl.uint8)
    tl.store(row[:, None] + pair[None, :], low | (high << 4), mask=wanted)
    byte = tl.arange(0, 4)[None, :]
    bits = tl.where(byte < 2, scales, minimums).to(tl.float16).to(tl.uint16, bitcast=True)
    header = tl.where(byte % 2 == 0, bits & 255, bits >> 8).to(tl.uint8)
    tl.store(row[:, None] + HALF + byte, header, mask=real[:, None])
