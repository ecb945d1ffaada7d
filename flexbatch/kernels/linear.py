"""Matrix products of activations with weights [out, in], at the rate the processor is best at. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from flexbatch.compression.precision import widened_product

# Below so many rows a CPU product with the weight as the left operand is up to three times as fast as torch's own;
# oneDNN's, which torch leaves out for fp32, is the fastest from a few rows on.
_FEW_ROWS = 192
_VERY_FEW_ROWS = 4
_PACKED_FOR = 128  # rows; the layout that is best for these is within a few percent of the best for all
_PACK_MULTIPLES = (64, 16)  # of outputs and inputs: other shapes would be padded, and take more memory than planned


def pack(weight: Tensor) -> Tensor:
    """Return ``weight`` [out, in] as an opaque operand for ``linear``: fp32 on a CPU in the blocks its products read.

    Up to twice as fast with few rows, a sixth with many. Takes as many bytes as ``weight``, which is returned as it
    is where there is no such layout.
    """
    multiples = all(size % multiple == 0 for size, multiple in zip(weight.shape, _PACK_MULTIPLES, strict=True))
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not multiples:
        return weight
    if not torch.backends.mkldnn.is_available():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR)
    return packed


def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Return ``x @ cat(parts).T + bias``: x [T, in], parts [out_i, in], bias [out] -> [T, out] in x's type.

    A part kept in a narrower type is widened on the way (see ``compression.precision``); one that is packed stands
    alone. With few rows on a CPU the result may be a transposed view: what follows (an addition, an activation, a
    rotation) reads it as it is.
    """
    if parts[0].is_mkldnn or _suits_onednn(x, parts):
        (operand,) = parts
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, operand, bias, "none", [], "")
        return product
    if len(parts) == 1 and parts[0].dtype == x.dtype and (x.device.type != "cpu" or x.shape[0] > _FEW_ROWS):
        return functional.linear(x, parts[0], bias)
    columns = x.t()
    stacked = torch.empty(sum(part.shape[0] for part in parts), x.shape[0], dtype=x.dtype, device=x.device)
    row = 0
    for part in parts:
        out = stacked[row : row + part.shape[0]]
        if part.dtype == x.dtype:
            torch.mm(part, columns, out=out)
        else:
            widened_product(columns, part, out)
        row += part.shape[0]
    result = stacked.t()
    return result if bias is None else result.add_(bias)


def _suits_onednn(x: Tensor, parts: Sequence[Tensor]) -> bool:
    weight = parts[0]
    return (
        len(parts) == 1
        and weight.dtype == x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] > _VERY_FEW_ROWS
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
    )
