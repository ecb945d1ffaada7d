"""How weights as stored become operands of a product: widening 16-bit storage to the compute type, exactly.

Knows nothing of tiers or models. fp16 and bf16 both widen to fp32 without rounding, so results do not depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_BYTES = 4 << 20  # a widened tile of this size is still in cache, and large enough that two cores share it well


def widened_product(columns: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write ``weight @ columns`` to ``out``: weight [rows, in] kept in a narrower type than columns [in, T].

    Tiles of rows are widened one after the other into one scratch buffer that stays in cache, so memory beyond the
    result is about ``TILE_BYTES`` and main memory moves the narrow bytes only.
    """
    out_features, in_features = weight.shape
    rows = max(1, min(out_features, TILE_BYTES // (in_features * columns.element_size())))
    scratch = torch.empty(rows, in_features, dtype=columns.dtype, device=columns.device)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        tile = scratch[: stop - start]
        tile.copy_(weight[start:stop])
        torch.mm(tile, columns, out=out[start:stop])
