"""Weights kept in 4 bits, unpacked for products tile by tile, so that the wide numbers never leave the cache.

Owns the ways to unpack; knows nothing of the products themselves, of models, tiers or how the codes came about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from flexbatch.compression.groups import MIDDLE, Packed, dequantize, groups_of
from flexbatch.compression.precision import tile_rows

Unpack = Callable[[Packed], Tensor]


def unpacked_tiles(
    weight: Packed, dtype: torch.dtype, at_most: int, method: str = "fused"
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of ``weight`` [out, in] in ``dtype``, a tile at a time: which rows, and the tile [rows, in].

    In fp32 a tile takes ``at_most`` bytes, or one row.
    Every method of ``METHODS`` gives the fp32 numbers of ``dequantize``, rounded once where ``dtype`` is narrower.
    Memory beyond a tile is an eighth of one.
    """
    out_features, in_features = weight.shape
    on_cpu = weight.codes.device.type == "cpu"
    unpack = METHODS[method] if on_cpu else dequantize
    rows = tile_rows(out_features, at_most // (4 * in_features))
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        yield slice(start, stop), unpack(weight.rows(start, stop)).to(dtype)


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
    numbers = table.view(torch.float16)[:, :, half // 2 :]  # [rows, groups, scale and minimum]
    numbers[..., 0] = weight.scales if direct else 1
    numbers[..., 1] = weight.minimums if direct and weight.minimums is not None else 0
    tile: Tensor = torch.ops.quantized.embedding_bag_4bit_unpack(table.view(rows * groups, half + 4))
    if weight.minimums is None:
        scales = weight.scales.float().reshape(-1, 1)
        zeros = MIDDLE if weight.zeros is None else weight.zeros.float().reshape(-1, 1)
        tile = tile.sub_(zeros * scales) if direct else tile.sub_(zeros).mul_(scales)
    elif not direct:
        tile.mul_(weight.scales.float().reshape(-1, 1)).add_(weight.minimums.float().reshape(-1, 1))
    return tile.view(rows, groups * weight.group)[:, :in_features]


METHODS: Mapping[str, Unpack] = MappingProxyType({"fused": _fused, "plain": _plain})
"""Ways to unpack a few rows to fp32 [rows, in] on a CPU, by name; all are exact."""
