"""Triton kernel for products with 4-bit weights: codes are dequantized in registers, inside the matrix product.

One kernel serves all numbers of rows: a program holds a tile of the output and walks over the groups of its rows. With
few rows the groups are also shared out among programs, whose sums a reduction adds in a fixed order. Sums are fp32.
Knows nothing of models; the torch reference is ``kernels.packed``.
"""

# ruff: noqa: N803, N806  what a kernel knows when it is compiled stands in capitals, as is usual in Triton

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from flexbatch.compression.groups import MIDDLE, Packed, groups_of

_FEW_ROWS = 16
_PROGRAMS = 512  # how many are wanted at least, where rows are few and only memory counts


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: rows of x, outputs, programs along the input dimension, warps, stages of loads."""

    rows: int
    outputs: int
    splits: int
    warps: int
    stages: int


def tile_for(rows: int, weight: Packed) -> Tile:
    """Return a tile for x of ``rows`` rows; for few rows it depends on the weight's shape only."""
    out_features, in_features = weight.shape
    if rows <= _FEW_ROWS:
        programs = triton.cdiv(out_features, 32)
        splits = max(1, min(groups_of(in_features, weight.group) // 2, triton.cdiv(_PROGRAMS, programs)))
        return Tile(_FEW_ROWS, 32, splits, warps=4, stages=3)
    return Tile(min(128, max(32, int(triton.next_power_of_2(rows)))), 64, 1, warps=4, stages=2)


def packed_product(x: Tensor, weight: Packed, tile: Tile | None = None) -> Tensor:
    """Return ``x @ weight.T``: x [T, in] fp16, bf16 or fp32 -> [T, out] of x's type.

    A weight is computed in fp32 and rounded once to x's type, as ``dequantize`` does. Scratch memory: the fp32 result
    of each split, where there are several.
    """
    rows = x.shape[0]
    out_features, in_features = weight.shape
    tile = tile or tile_for(rows, weight)
    x = x if x.stride(1) == 1 else x.contiguous()
    groups = groups_of(in_features, weight.group)
    kind = torch.float32 if tile.splits > 1 else x.dtype
    out = torch.empty(tile.splits, rows, out_features, dtype=kind, device=x.device)
    assert all(part.is_contiguous() for part in weight.tensors().values())
    grid = (triton.cdiv(out_features, tile.outputs), triton.cdiv(rows, tile.rows), tile.splits)
    _product_kernel[grid](
        out,
        x,
        weight.codes,
        weight.scales,
        next((part for part in (weight.minimums, weight.zeros) if part is not None), weight.scales),
        rows,
        out_features,
        x.stride(0),
        IN=in_features,
        GROUP=weight.group,
        GROUPS=groups,
        PER_SPLIT=triton.cdiv(groups, tile.splits),
        INTEGER_ZEROS=weight.minimums is None,
        MIDDLE=MIDDLE if weight.offset == "middle" else 0,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return out[0] if tile.splits == 1 else out.sum(0).to(x.dtype)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _product_kernel(
    out: tl.tensor,
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    x_row: tl.tensor,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_SPLIT: tl.constexpr,
    INTEGER_ZEROS: tl.constexpr,
    MIDDLE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    HALF: tl.constexpr = GROUP // 2
    BYTES: tl.constexpr = (IN + 1) // 2
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    real_row = row < rows
    real_output = output < outputs
    pair = tl.arange(0, HALF)
    total = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    first = tl.program_id(2) * PER_SPLIT
    for group in range(first, tl.minimum(first + PER_SPLIT, GROUPS)):
        place = group * HALF + pair
        known = place < BYTES
        byte = tl.load(
            codes + output[None, :] * BYTES + place[:, None], mask=known[:, None] & real_output[None, :], other=0
        )
        scale = tl.load(scales + output * GROUPS + group, mask=real_output, other=0.0).to(tl.float32)
        if MIDDLE > 0:  # the zero of every group
            offset = tl.full([OUTPUTS], MIDDLE, tl.float32)
        else:
            offset = tl.load(offsets + output * GROUPS + group, mask=real_output, other=0).to(tl.float32)
        low = (byte & 15).to(tl.float32)
        high = (byte >> 4).to(tl.float32)
        if INTEGER_ZEROS:
            low = (low - offset[None, :]) * scale[None, :]
            high = (high - offset[None, :]) * scale[None, :]
        else:
            low = low * scale[None, :] + offset[None, :]
            high = high * scale[None, :] + offset[None, :]
        # Even inputs meet the lower nibbles, odd ones the upper: two products, and no interleaving of registers.
        source = x + row[:, None] * x_row + 2 * place[None, :]
        even = tl.load(source, mask=real_row[:, None] & (2 * place < IN)[None, :], other=0.0)
        odd = tl.load(source + 1, mask=real_row[:, None] & (2 * place + 1 < IN)[None, :], other=0.0)
        total = tl.dot(even, low.to(even.dtype), total, input_precision="ieee")
        total = tl.dot(odd, high.to(odd.dtype), total, input_precision="ieee")
    target = out + (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * outputs + output[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=real_row[:, None] & real_output[None, :])
