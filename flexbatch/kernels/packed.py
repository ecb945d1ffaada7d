"""Matrix products with weights kept in 4 bits, on the CPU: unpacked to fp32 tile by tile, so that they stay in cache.

Owns the ways to unpack and the choice among them; knows nothing of models, tiers or how the codes came about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from flexbatch.compression.groups import Packed, dequantize, groups_of

TILE_BYTES = 1 << 20
"""Bytes of an unpacked fp32 tile: it fits the second-level cache of one core."""

Unpack = Callable[[Packed], Tensor]


def packed_product(columns: Tensor, weight: Packed, out: Tensor, method: str = "fused") -> None:
    """Write ``weight @ columns`` to ``out`` [out, T]: columns fp32 [in, T], weight [out, in] in 4 bits.

    Every method of ``METHODS`` multiplies the same fp32 numbers, those of ``dequantize``; they differ in speed only.
    Memory beyond the result is two tiles.
    """
    unpack = METHODS[method]
    out_features, in_features = weight.shape
    rows = max(1, min(out_features, TILE_BYTES // (4 * in_features)))
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        torch.mm(unpack(weight.rows(start, stop)), columns, out=out[start:stop])


def packed_linear(x: Tensor, parts: Sequence[Packed], bias: Tensor | None = None, method: str = "fused") -> Tensor:
    """Return ``x @ cat(parts).T + bias``: x fp32 [T, in], parts [out_i, in], bias [out] -> [T, out], a transposed view.

    Weights are the left operand, as in ``kernels.linear``.
    """
    columns = x.t()
    product = torch.empty(sum(part.shape[0] for part in parts), x.shape[0], dtype=x.dtype)
    row = 0
    for part in parts:
        packed_product(columns, part, product[row : row + part.shape[0]], method)
        row += part.shape[0]
    result = product.t()
    return result if bias is None else result.add_(bias)


@dataclass(frozen=True, slots=True)
class MethodRates:
    """Measured rates of each method, weights a second at numbers of rows: ``{"fused": {1: 4.1e9, 16: 1.2e9}}``."""

    rates: Mapping[str, Mapping[int, float]]

    def best(self, rows: int) -> str:
        """The method that is fastest at the measured number of rows nearest below ``rows``; without any, ``fused``."""

        def rate(method: str) -> float:
            measured = self.rates.get(method, {})
            below = [number for number in measured if number <= rows] or sorted(measured)[:1]
            return measured[max(below)] if below else 0.0

        return max(METHODS, key=rate)


def _plain(weight: Packed) -> Tensor:
    """The reference: several passes of elementwise operations over the tile."""
    return dequantize(weight)


def _fused(weight: Packed) -> Tensor:
    """Torch's unpacker of 4-bit embedding tables: one vectorised pass from codes, scale and minimum to fp32.

    It takes a group as a row of its table: the codes, then scale and minimum in fp16. What it cannot hold exactly
    (integer zeros, bf16 scales) is applied to the unpacked tile; each way every number is rounded once.
    """
    rows, in_features = weight.shape
    groups, half = groups_of(in_features, weight.group), weight.group // 2
    table = torch.empty(rows, groups, half + 4, dtype=torch.uint8)
    code_bytes = weight.codes.shape[1]
    whole = code_bytes // half
    table[:, :whole, :half] = weight.codes[:, : whole * half].view(rows, whole, half)
    if whole < groups:
        table[:, whole, : code_bytes - whole * half] = weight.codes[:, whole * half :]
    direct = weight.scales.dtype == torch.float16
    first, second = table[..., half : half + 2], table[..., half + 2 :]
    if direct:
        first.copy_(_bytes(weight.scales))
    else:
        first.copy_(_bytes(torch.ones(1, 1, dtype=torch.float16)))
    if direct and weight.minimums is not None:
        second.copy_(_bytes(weight.minimums))
    else:
        second.zero_()
    tile: Tensor = torch.ops.quantized.embedding_bag_4bit_unpack(table.view(rows * groups, half + 4))
    scales = weight.scales.float().reshape(-1, 1)
    if weight.zeros is not None:
        zeros = weight.zeros.float().reshape(-1, 1)
        tile = tile.sub_(zeros * scales) if direct else tile.sub_(zeros).mul_(scales)
    elif weight.minimums is not None and not direct:
        tile.mul_(scales).add_(weight.minimums.float().reshape(-1, 1))
    return tile.view(rows, groups * weight.group)[:, :in_features]


METHODS: Mapping[str, Unpack] = MappingProxyType({"fused": _fused, "plain": _plain})
"""Ways to unpack a few rows to fp32 [rows, in], by name; all are exact."""


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.unsqueeze(-1).view(torch.uint8)
