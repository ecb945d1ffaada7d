"""What lies between a layer's products as compiled kernels for a CPU, one pass each: RMS norm, gated SiLU, rotation.

The same operations as torch's, rounded to the operands' type where those round; only sums are in another order. Torch
takes three to eight passes, most of them to widen and to round.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from flexbatch.kernels.native import FREE, PIECE, kind, launch
from flexbatch.kernels.numba_parts import (
    address_of,
    compiled,
    draw,
    exponential,
    float_of,
    load,
    load_long,
    rounded,
    store,
)

_ROWS = 16  # of a piece of work

# Columns of a launch's record.
ROWS, X, X_ROW, OUT, WIDTH = range(FREE, FREE + 5)
WEIGHT, EPS = range(FREE + 5, FREE + 7)
COS, SIN, HEADS, X_HEAD = range(FREE + 5, FREE + 9)

_Float = np.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X [T, dim] and weight [dim] of one type -> [T, dim]; see ``norms.rms_norm``."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, width, dtype=x.dtype)
    numbers = [rows, x.data_ptr(), x.stride(0), out.data_ptr(), width, weight.data_ptr(), _bits(eps)]
    launch(_rms_norm(kind(x)), numbers, -(-rows // _ROWS))
    return out


def gated_silu(gate_up: Tensor) -> Tensor:
    """[T, 2 * width]: gates, then what they weigh -> silu(gates) * the others [T, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    numbers = [rows, gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), width]
    launch(_gated_silu(kind(gate_up)), numbers, -(-rows // _ROWS))
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """X [T, heads, dim], cos and sin fp32 [T, dim / 2] -> [T, heads, dim]; see ``rotary.apply_rotary``."""
    rows, heads, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(rows, heads, width, dtype=x.dtype)
    numbers = [rows, x.data_ptr(), x.stride(0), out.data_ptr(), width]
    numbers += [cos.data_ptr(), sin.data_ptr(), heads, x.stride(1)]
    launch(_rotate(kind(x)), numbers, -(-rows // _ROWS))
    return out


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@functools.cache
def _rms_norm(kind: int) -> int:
    def kernel(record: int) -> None:
        rows, width = load_long(record, ROWS), load_long(record, WIDTH)
        x, out, weight = load_long(record, X), load_long(record, OUT), load_long(record, WEIGHT)
        eps = float_of(np.int32(load_long(record, EPS)))
        while True:
            first = draw(record, PIECE) * _ROWS
            if first >= rows:
                break
            for row in range(first, min(rows, first + _ROWS)):
                at = row * load_long(record, X_ROW)
                total = _Float(0)
                for n in range(width):
                    number = load(kind, x, at + n)
                    total += number * number
                scale = _Float(1) / np.sqrt(total / _Float(width) + eps)
                for n in range(width):
                    normed = rounded(kind, load(kind, x, at + n) * scale)
                    store(kind, out, row * width + n, load(kind, weight, n) * normed)

    return address_of(compiled(kernel))


@functools.cache
def _gated_silu(kind: int) -> int:
    def kernel(record: int) -> None:
        rows, width = load_long(record, ROWS), load_long(record, WIDTH)
        x, out = load_long(record, X), load_long(record, OUT)
        while True:
            first = draw(record, PIECE) * _ROWS
            if first >= rows:
                break
            for row in range(first, min(rows, first + _ROWS)):
                at = row * load_long(record, X_ROW)
                for n in range(width):
                    gate, other = load(kind, x, at + n), load(kind, x, at + width + n)
                    small = exponential(-abs(gate))
                    share = (_Float(1) if gate >= _Float(0) else small) / (_Float(1) + small)
                    store(kind, out, row * width + n, rounded(kind, gate * share) * other)

    return address_of(compiled(kernel))


@functools.cache
def _rotate(kind: int) -> int:
    def kernel(record: int) -> None:
        rows, width, heads = load_long(record, ROWS), load_long(record, WIDTH), load_long(record, HEADS)
        x, out = load_long(record, X), load_long(record, OUT)
        cos, sin, half = load_long(record, COS), load_long(record, SIN), width // 2
        while True:
            first = draw(record, PIECE) * _ROWS
            if first >= rows:
                break
            for row in range(first, min(rows, first + _ROWS)):
                for head in range(heads):
                    at = row * load_long(record, X_ROW) + head * load_long(record, X_HEAD)
                    into = (row * heads + head) * width
                    for n in range(half):
                        own, other = load(kind, x, at + n), load(kind, x, at + half + n)
                        c = rounded(kind, load(0, cos, row * half + n))
                        s = rounded(kind, load(0, sin, row * half + n))
                        store(kind, out, into + n, rounded(kind, own * c) - other * s)
                        store(kind, out, into + half + n, rounded(kind, other * c) + own * s)

    return address_of(compiled(kernel))
