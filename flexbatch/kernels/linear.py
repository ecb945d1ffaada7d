"""Matrix products of activations with weights [out, in], at the rate the processor is best at. Knows no models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from flexbatch.compression.precision import widened_tiles

# On a CPU oneDNN's fp32 products, which torch does not use by itself, are the fastest from a few rows on; with fewer,
# torch's own with the weight as the left operand.
_VERY_FEW_ROWS = 4
_FEW_ROWS = 192  # where there is no oneDNN: up to here the weight as the left operand is up to three times as fast
_PACKED_FOR = 128  # rows; the layout that is best for these is within a few percent of the best for all
_PACK_MULTIPLES = (64, 16)  # of outputs and inputs: other shapes would be padded, and take more memory than planned


def pack(weight: Tensor) -> Tensor:
    """Return ``weight`` [out, in] as an opaque operand for ``linear``: fp32 on a CPU in the blocks its products read.

    Up to twice as fast with few rows, a sixth with many. Takes as many bytes as ``weight``, which is returned as it
    is where there is no such layout.
    """
    multiples = all(size % multiple == 0 for size, multiple in zip(weight.shape, _PACK_MULTIPLES, strict=True))
    if not multiples or not _has_onednn(weight):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR)
    return packed


def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Return ``x @ cat(parts).T + bias``: x [T, in], parts [out_i, in], bias [out] -> [T, out] in x's type.

    A part kept in a narrower type is widened on the way (see ``compression.precision``); one that is packed stands
    alone. With few rows on a CPU the result may be a transposed view: what follows (an addition, an activation, a
    rotation) reads it as it is.
    """
    if parts[0].is_mkldnn:
        (packed,) = parts
        return _onednn(x, packed, bias)
    tokens = x.shape[0]
    on_cpu = x.device.type == "cpu"
    blocked = tokens > _VERY_FEW_ROWS and _has_onednn(x)
    if len(parts) == 1 and parts[0].dtype == x.dtype and (blocked or not on_cpu or tokens > _FEW_ROWS):
        return _onednn(x, parts[0], bias) if blocked else functional.linear(x, parts[0], bias)
    outputs = sum(part.shape[0] for part in parts)
    if blocked:
        result = torch.empty(tokens, outputs, dtype=x.dtype)
        for columns, tile in _tiles(parts, x.dtype):
            result[:, columns] = _onednn(x, tile, None)
    else:
        stacked = torch.empty(outputs, tokens, dtype=x.dtype, device=x.device)
        for rows, tile in _tiles(parts, x.dtype):
            torch.mm(tile, x.t(), out=stacked[rows])
        result = stacked.t()
    return result if bias is None else result.add_(bias)


def _tiles(parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """All parts in ``dtype``: which outputs, and their rows; those in that type already are one tile each."""
    base = 0
    for part in parts:
        if part.dtype == dtype:
            yield slice(base, base + part.shape[0]), part
        else:
            for rows, tile in widened_tiles(part, dtype):
                yield slice(base + rows.start, base + rows.stop), tile
        base += part.shape[0]


def _has_onednn(operand: Tensor) -> bool:
    """Whether oneDNN multiplies operands like this one."""
    return operand.device.type == "cpu" and operand.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not (weight.is_mkldnn or weight.is_contiguous()):
        return functional.linear(x, weight, bias)  # a copy would take memory that nobody planned
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
