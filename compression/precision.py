"""How weights as stored become operands of a product: a tile at a time they are brought to the compute type.

Knows nothing of tiers or models. fp16 and bf16 both widen to fp32 without rounding, so results do not depend on it; to
bf16 what is stored otherwise is rounded, as it is where it is converted once, when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 64  # outputs that a thread of a product takes at a time


def tile_rows(outputs: int, most: int) -> int:
    """Rows of a tile of a matrix with ``outputs`` rows: at most ``most``, or one.

    Tiles are about equal, for small products are slow, and hold as many blocks for every thread where that can be: one
    that is left over keeps a single thread busy.
    """
    if outputs <= most:
        return outputs
    most = max(1, most)
    even = -(-outputs // -(-outputs // most))
    for multiple in (_BLOCK * torch.get_num_threads(), _BLOCK):
        if most >= multiple:
            return min(-(-even // multiple), most // multiple) * multiple
    return most


def widened_tiles(weight: Tensor, dtype: torch.dtype, at_most: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of ``weight`` [out, in] in ``dtype``, a tile at a time: which rows, and the tile [rows, in].

    A tile is gone when the next one comes: all share one scratch buffer of ``at_most`` bytes (or one row). As long as
    that stays in cache main memory moves the narrow bytes only. Tiles are about equal, for small products are slow.
    """
    out_features, in_features = weight.shape
    rows = tile_rows(out_features, at_most // (in_features * dtype.itemsize))
    scratch = torch.empty(rows, in_features, dtype=dtype, device=weight.device)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        yield slice(start, stop), scratch[: stop - start].copy_(weight[start:stop])
