"""How weights as stored become operands of a product: widening 16-bit storage to the compute type, exactly.

Knows nothing of tiers or models. fp16 and bf16 both widen to fp32 without rounding, so results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_BYTES = 4 << 20  # a widened tile of this size is still in cache, and large enough that two cores share it well


def widened_tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of ``weight`` [out, in] in ``dtype``, a tile at a time: which rows, and the tile [rows, in].

    A tile is gone when the next one comes: all share one scratch buffer that stays in cache, so memory beyond it is
    ``TILE_BYTES`` and main memory moves the narrow bytes only.
    """
    out_features, in_features = weight.shape
    rows = max(1, min(out_features, TILE_BYTES // (in_features * dtype.itemsize)))
    scratch = torch.empty(rows, in_features, dtype=dtype, device=weight.device)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        yield slice(start, stop), scratch[: stop - start].copy_(weight[start:stop])
