"""From a 16-bit weight to its packed form, without data: grouped along the input dimension, a few rows at a time.

Knows nothing of checkpoints or models. Memory beyond the result is a few MB, whatever the weight's size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from flexbatch.compression.grids import nearest_codes, plain_range, searched_range
from flexbatch.compression.groups import SCALE_TYPES, Packed, groups_of, pack_codes, row_bytes
from flexbatch.errors import ModelError

Method = Literal["minmax", "search"]
_TILE = 1 << 18  # weights at a time: the fp32 tiles of the search stay in cache


def quantize(
    weight: Tensor, *, group: int = 64, method: Method = "search", scale_type: torch.dtype = torch.float16
) -> Packed:
    """Pack weight [out, in] of any floating type; raises ``ModelError`` for what is not finite or out of range.

    ``minmax`` spans each group's range; ``search`` looks for the grid of least squared error, each weight's error
    weighted by its magnitude plus the root mean square of its row: what large weights multiply matters more (measured
    in docs/accuracy.md), and no data is needed to know it.
    """
    assert scale_type in SCALE_TYPES
    out_features, in_features = weight.shape
    groups = groups_of(in_features, group)
    codes = torch.empty(out_features, row_bytes(in_features), dtype=torch.uint8)
    scales = torch.empty(out_features, groups, dtype=scale_type)
    minimums = torch.empty_like(scales)
    step = max(1, _TILE // max(1, groups * group))
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        tile = weight[rows].float()
        grouped = split_groups(tile, group)  # [rows * groups, group]
        if method == "minmax":
            scale, minimum = plain_range(grouped, scale_type)
        else:
            scale, minimum = searched_range(grouped, importance_of(tile, group), scale_type)
        tile_codes = nearest_codes(grouped, scale, minimum).view(-1, groups * group)[:, :in_features]
        codes[rows] = pack_codes(tile_codes)
        scales[rows] = scale.view(-1, groups)
        minimums[rows] = minimum.view(-1, groups)
    refuse_unfit(scales, minimums)
    return Packed(codes, scales, minimums, None, group, (out_features, in_features))


def split_groups(tile: Tensor, group: int) -> Tensor:
    """[rows, in] -> [rows * groups, group]; a shorter last group is filled up with its last number."""
    missing = -tile.shape[1] % group
    if missing:
        tile = torch.cat([tile, tile[:, -1:].expand(-1, missing)], dim=1)
    return tile.reshape(-1, group)


def importance_of(tile: Tensor, group: int, inputs: Tensor | None = None) -> Tensor:
    """How much each weight's squared error counts, [rows * groups, group]: by its magnitude, and by ``inputs`` [in]."""
    importance = tile.abs().add_(tile.square().mean(1, keepdim=True).sqrt_())
    if inputs is not None:
        importance.mul_(inputs)
    return functional.pad(importance, (0, -tile.shape[1] % group)).reshape(-1, group)


def refuse_unfit(scales: Tensor, minimums: Tensor) -> None:
    """Raise ``ModelError`` if a group could not be put into numbers of the scales' type."""
    if not bool(torch.isfinite(scales).all() & torch.isfinite(minimums).all()):
        raise ModelError(
            "a weight holds numbers that are not finite or do not fit 16 bit; such a tensor cannot be kept in 4 bit"
        )
