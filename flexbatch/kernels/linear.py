"""Matrix products of activations with weights [out, in], at the rate the processor is best at. Knows no models."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from flexbatch.compression.groups import Packed
from flexbatch.compression.precision import tile_rows, widened_tiles
from flexbatch.kernels.packed import unpacked_tiles
from flexbatch.policy.footprint import GPU_TILE_BYTES, tile_bytes

Weight = Tensor | Packed
"""A weight [out, in] in any form it may rest in."""

# On a CPU oneDNN's products, which torch does not use by itself in fp32, are the fastest.
_FEW_ROWS = 192  # where there is no oneDNN: up to here the weight as the left operand is up to three times as fast
_LANES = 16  # numbers that an instruction multiplies: with the weight as the left operand, of as many rows
_FEWEST_COLUMNS = 128  # of a widened tile in backward: narrower products would be slow
_PACKED_FOR = 128  # rows; the layout that is best for these is within a few percent of the best for all
_FUSED_ROWS = 256  # on a GPU: beyond, products are bound by their operations, and plain ones run faster
_PACK_MULTIPLES = {  # of outputs and inputs: other shapes would be padded, and take more memory than planned
    torch.float32: (64, 16),
    torch.bfloat16: (64, 32),
}


def pack(weight: Tensor) -> Tensor:
    """Return ``weight`` [out, in] as an opaque operand for ``linear``: on a CPU in the blocks its products read.

    In fp32, and in bf16 where oneDNN has it. Up to twice as fast with few rows, a sixth with many. Takes as many bytes
    as ``weight``, which is returned as it is where there is no such layout.
    """
    if not has_onednn(weight):
        return weight
    if any(size % multiple for size, multiple in zip(weight.shape, _PACK_MULTIPLES[weight.dtype], strict=True)):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR)
    return packed


def linear(x: Tensor, parts: Sequence[Weight], bias: Tensor | None = None) -> Tensor:
    """Return ``x @ cat(parts).T + bias``: x [T, in], parts [out_i, in], bias [out] -> [T, out] in x's type.

    A part kept in a narrower type is widened on the way (see ``compression.precision``), one in 4 bits is unpacked
    (see ``kernels.packed``); one in oneDNN's blocks stands alone. Where a CPU has no oneDNN the result may be a
    transposed view: what follows (an addition, an activation, a rotation) reads it as it is.
    """
    first = parts[0]
    if _in_blocks(first):
        return _onednn(x, first, bias)
    tokens = x.shape[0]
    on_cpu = x.device.type == "cpu"
    if not on_cpu and any(isinstance(part, Packed) for part in parts):
        return _packed_on_gpu(x, parts, bias)
    blocked = has_onednn(x)
    turned = blocked and _pays_turned(tokens)
    plain = len(parts) == 1 and isinstance(first, Tensor) and first.dtype == x.dtype
    if plain and isinstance(first, Tensor) and not turned and (blocked or not on_cpu or tokens > _FEW_ROWS):
        return _onednn(x, first, bias) if blocked else functional.linear(x, first, bias)
    outputs = sum(part.shape[0] for part in parts)
    if blocked:
        result = torch.empty(tokens, outputs, dtype=x.dtype)
        x = x.contiguous() if turned else x
        for columns, tile in _tiles(parts, x, cut=turned):
            if turned and tile.is_contiguous():
                result[:, columns] = _onednn(tile, x, None).t()
            elif x.dtype == torch.bfloat16:
                torch.mm(x, tile.t(), out=result[:, columns])  # by oneDNN as well, to where it belongs
            else:
                result[:, columns] = _onednn(x, tile, None)
    else:
        stacked = torch.empty(outputs, tokens, dtype=x.dtype, device=x.device)
        for rows, tile in _tiles(parts, x):
            torch.mm(tile, x.t(), out=stacked[rows])
        result = stacked.t()
    return result if bias is None else result.add_(bias)


def linear_backward(dy: Tensor, weight: Weight) -> Tensor:
    """Return ``dy @ weight``: dy [T, out], weight [out, in] -> [T, in] in dy's type, the gradient of the input.

    A narrower weight is widened some columns at a time, one in 4 bits unpacked some rows at a time; one in oneDNN's
    blocks takes as much memory again.
    """
    if isinstance(weight, Packed):
        total = dy.new_zeros(dy.shape[0], weight.shape[1])
        for chosen, tile in unpacked_tiles(weight, dy.dtype, _at_most(dy)):
            total.add_(_backward_product(dy[:, chosen], tile))
        return total
    dense = weight.to_dense() if weight.is_mkldnn else weight
    if dense.dtype == dy.dtype:
        return _backward_product(dy, dense)
    rows, columns = dense.shape
    result = dy.new_empty(dy.shape[0], columns)
    at_once = tile_rows(columns, max(_FEWEST_COLUMNS, _at_most(dy) // (rows * dy.dtype.itemsize)))
    scratch = torch.empty(rows * at_once, dtype=dy.dtype, device=dy.device)
    for start in range(0, columns, at_once):
        stop = min(start + at_once, columns)
        tile = scratch[: rows * (stop - start)].view(rows, stop - start).copy_(dense[:, start:stop])
        result[:, start:stop] = _backward_product(dy, tile)
    return result


def _backward_product(left: Tensor, right: Tensor) -> Tensor:
    """[T, k] @ [k, n]. oneDNN reads the second matrix as it lies, and is the faster one in fp32 on a CPU.

    In bf16 torch's own product is oneDNN's.
    """
    if has_onednn(left) and left.dtype == torch.float32:
        return _onednn(left.contiguous(), right.t(), None)
    return left @ right


def _packed_on_gpu(x: Tensor, parts: Sequence[Weight], bias: Tensor | None) -> Tensor:
    """The fused kernel where few rows leave memory the limit, dequantization and a plain product beyond."""
    products = []
    for part in parts:
        if isinstance(part, Packed) and x.shape[0] <= _FUSED_ROWS:
            products.append(_fused_kernel(x, part))
        else:
            products += [functional.linear(x, tile) for _, tile in _tiles([part], x)]
    result = products[0] if len(products) == 1 else torch.cat(products, dim=1)
    return result if bias is None else result.add_(bias)


def _fused_kernel(x: Tensor, weight: Packed) -> Tensor:
    from flexbatch.kernels.packed_triton import packed_product  # Triton is there only where there is a GPU

    return packed_product(x, weight)


def _at_most(x: Tensor) -> int:
    """Bytes of a tile of weights that are brought to the type of ``x``, for a product over its rows."""
    on_gpu = x.device.type != "cpu" and x.dtype != torch.float32
    return GPU_TILE_BYTES if on_gpu else tile_bytes(x.shape[0])


def _pays_turned(rows: int) -> bool:
    """Whether a product is faster with the weight as the left operand, which then need not be turned itself.

    With 16 rows it takes a sixth less, with 64 a twentieth; but always as long as with the next multiple of ``_LANES``.
    """
    return rows <= 4 * _LANES and -rows % _LANES <= _LANES // 4


def _tiles(parts: Sequence[Weight], x: Tensor, *, cut: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """All parts in the type of ``x``: which outputs, and their rows.

    Those in that type already are one tile each, or with ``cut`` as many as the others.
    """
    base, dtype, at_most = 0, x.dtype, _at_most(x)
    for part in parts:
        if isinstance(part, Tensor) and part.dtype == dtype:
            size = tile_rows(part.shape[0], at_most // (part.shape[1] * dtype.itemsize)) if cut else part.shape[0]
            for start in range(0, part.shape[0], size):
                tile = part[start : start + size]
                yield slice(base + start, base + start + tile.shape[0]), tile
        else:
            tiles = (
                unpacked_tiles(part, dtype, at_most)
                if isinstance(part, Packed)
                else widened_tiles(part, dtype, at_most)
            )
            for rows, tile in tiles:
                yield slice(base + rows.start, base + rows.stop), tile
        base += part.shape[0]


def _in_blocks(weight: Weight) -> TypeGuard[Tensor]:
    """Whether ``weight`` is in the form that ``pack`` gives."""
    return isinstance(weight, Tensor) and weight.is_mkldnn


def has_onednn(operand: Tensor) -> bool:
    """Whether oneDNN multiplies operands like this one: in bf16 not on every CPU."""
    if operand.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return operand.dtype == torch.float32 or (operand.dtype == torch.bfloat16 and _multiplies_bf16())


@functools.cache
def _multiplies_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not (weight.is_mkldnn or weight.is_contiguous()):
        return functional.linear(x, weight, bias)  # a copy would take memory that nobody planned
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
