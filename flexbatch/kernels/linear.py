"""Matrix products of activations with weights [out, in], at the rate the processor is best at. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from flexbatch.compression.precision import widened_product

# Below this many rows a CPU product with the weight as the left operand runs up to three times as fast.
_FEW_ROWS = 192


def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Return ``x @ cat(parts).T + bias``: x [T, in], parts [out_i, in], bias [out] -> [T, out] in x's type.

    A part kept in a narrower type is widened on the way (see ``compression.precision``). With few rows on a CPU the
    result is a transposed view: what follows (an addition, an activation, a rotation) reads it as it is.
    """
    if len(parts) == 1 and parts[0].dtype == x.dtype and (x.device.type != "cpu" or x.shape[0] > _FEW_ROWS):
        return functional.linear(x, parts[0], bias)
    columns = x.t()
    product = torch.empty(sum(part.shape[0] for part in parts), x.shape[0], dtype=x.dtype, device=x.device)
    row = 0
    for part in parts:
        out = product[row : row + part.shape[0]]
        if part.dtype == x.dtype:
            torch.mm(part, columns, out=out)
        else:
            widened_product(columns, part, out)
        row += part.shape[0]
    result = product.t()
    return result if bias is None else result.add_(bias)
