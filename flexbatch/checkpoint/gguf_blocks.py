"""The block types of GGUF tensors: their sizes, and dequantization to fp32, vectorised.

Values are those of ggml's reference (and of the package ``gguf``), bit for bit: products and sums in the same order.
Knows bytes of blocks; nothing of files, names or models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NAMES = (
    "0 F32, 1 F16, 2 Q4_0, 3 Q4_1, 6 Q5_0, 7 Q5_1, 8 Q8_0, 9 Q8_1, 10 Q2_K, 11 Q3_K, 12 Q4_K, 13 Q5_K, 14 Q6_K, "
    "15 Q8_K, 16 IQ2_XXS, 17 IQ2_XS, 18 IQ3_XXS, 19 IQ1_S, 20 IQ4_NL, 21 IQ3_S, 22 IQ2_S, 23 IQ4_XS, 24 I8, 25 I16, "
    "26 I32, 27 I64, 28 F64, 29 IQ1_M, 30 BF16, 34 TQ1_0, 35 TQ2_0, 39 MXFP4"
)
TYPE_NAMES: dict[int, str] = {int(number): name for number, name in (entry.split(" ") for entry in _NAMES.split(", "))}
"""Every type of ggml by its number, those that are not supported included."""

_TILE = 2**18  # weights dequantized at a time: the fp32 intermediates stay in cache


def _halves(raw: Tensor) -> Tensor:
    """uint8 [n, 2k] -> fp32 [n, k] from fp16."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor, width: int) -> Tensor:
    """uint8 [n, k * width] -> [n, k, 2, width]: the low nibbles of ``width`` bytes, then their high ones."""
    lanes = raw.reshape(raw.shape[0], -1, 1, width)
    return torch.cat([lanes & 15, lanes >> 4], dim=2)


def _bit_planes(raw: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """uint8 [n, k, width] -> [n, k, shifts, width]."""
    return (raw.unsqueeze(2) >> torch.tensor(shifts, dtype=torch.uint8).view(1, 1, -1, 1)) & mask


def _q4_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 2:], 16).reshape(-1, 32).float()
    return _halves(blocks[:, :2]) * (codes - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 4:], 16).reshape(-1, 32).float()
    return _halves(blocks[:, :2]) * codes + _halves(blocks[:, 2:4])


def _fifth_bits(raw: Tensor) -> Tensor:
    """uint8 [n, 4] -> the 32 bits, lowest first, each worth 16: [n, 32]."""
    bits = (raw.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.reshape(-1, 32) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:], 16).reshape(-1, 32) | _fifth_bits(blocks[:, 2:6])
    return _halves(blocks[:, :2]) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:], 16).reshape(-1, 32) | _fifth_bits(blocks[:, 4:8])
    return _halves(blocks[:, :2]) * codes.float() + _halves(blocks[:, 2:4])


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _halves(blocks[:, :2])


def _scales_and_minimums(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes [n, 12] -> eight 6-bit scales and eight 6-bit minimums [n, 8, 1]; the last four of each are split.

    Bytes 0..3 hold scales 0..3 and the top bits of scales 4..7, bytes 4..7 the same of the minimums; bytes 8..11 hold
    the low nibbles of scales 4..7 and, above them, of minimums 4..7.
    """
    low, high, rest = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = torch.cat([low & 63, (rest & 15) | ((low >> 2) & 48)], dim=1)
    minimums = torch.cat([high & 63, (rest >> 4) | ((high >> 2) & 48)], dim=1)
    return scales.float().unsqueeze(2), minimums.float().unsqueeze(2)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    step = _halves(blocks[:, :2]).unsqueeze(2) * scales
    minimum = _halves(blocks[:, 2:4]).unsqueeze(2) * minimums
    codes = _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32).float()
    return (step * codes - minimum).view(-1, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    step = _halves(blocks[:, :2]).unsqueeze(2) * scales
    minimum = _halves(blocks[:, 2:4]).unsqueeze(2) * minimums
    fifth = _bit_planes(blocks[:, 16:48].unsqueeze(1), (0, 1, 2, 3, 4, 5, 6, 7), 1).reshape(-1, 8, 32) << 4
    codes = (_nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | fifth).float()
    return (step * codes - minimum).view(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 8, 32)
    high = _bit_planes(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    step = (_halves(blocks[:, 208:]) * scales).unsqueeze(2)
    codes = (low | high).reshape(-1, 16, 16).float() - 32
    return (step * codes).view(-1, 256)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float32)


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


@dataclass(frozen=True, slots=True)
class Block:
    """``weights`` weights in ``nbytes`` bytes. ``dtype``: the values as they are stored, where blocks are plain."""

    weights: int
    nbytes: int
    widen: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None = None


BLOCKS: dict[str, Block] = {
    "F32": Block(1, 4, _f32, torch.float32),
    "F16": Block(1, 2, _halves, torch.float16),
    "BF16": Block(1, 2, _bf16, torch.bfloat16),
    "Q8_0": Block(32, 34, _q8_0),
    "Q4_0": Block(32, 18, _q4_0),
    "Q4_1": Block(32, 20, _q4_1),
    "Q5_0": Block(32, 22, _q5_0),
    "Q5_1": Block(32, 24, _q5_1),
    "Q4_K": Block(256, 144, _q4_k),
    "Q5_K": Block(256, 176, _q5_k),
    "Q6_K": Block(256, 210, _q6_k),
}
"""The supported types by name."""


def dequantize(raw: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Stored bytes (uint8, flat) -> fp32 of ``shape``; memory beyond the result is a few MB.

    A value that is not finite is passed on (see ``first_not_finite``).
    """
    block = BLOCKS[kind]
    blocks = raw.view(-1, block.nbytes)
    result = torch.empty(blocks.shape[0] * block.weights, dtype=torch.float32)
    step = max(1, _TILE // block.weights)
    for start in range(0, blocks.shape[0], step):
        values = block.widen(blocks[start : start + step]).reshape(-1)
        result[start * block.weights : start * block.weights + values.numel()] = values
    return result.view(shape)


def first_not_finite(values: Tensor) -> int | None:
    """Return the place of the first value that is infinite or no number, or None: what damaged scales make."""
    flat = values.reshape(-1)
    for start in range(0, flat.numel(), _TILE):
        wrong = ~torch.isfinite(flat[start : start + _TILE])
        if bool(wrong.any()):
            return start + int(wrong.int().argmax())
    return None
