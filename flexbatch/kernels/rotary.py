"""Rotary position embedding: frequencies with their scalings, a table of cosines and sines, and its application.

Knows nothing of ``config.json``: what a scaling needs stands in ``Rope``. Sources: RoFormer (arXiv 2104.09864), YaRN
(arXiv 2309.00071) and Llama 3.1's published scaling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexbatch.kernels import native
from flexbatch.shapes import Rope

# Rows are always computed in blocks of this many, so that an entry never depends on how far a table has grown.
_BLOCK = 1024


def inverse_frequencies(rope: Rope) -> tuple[Tensor, float]:
    """Return the inverse frequencies, fp32 [dim / 2], and the factor by which cos and sin are multiplied."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    powers: Tensor = rope.theta**exponents
    plain = 1.0 / powers
    parameters = rope.parameters or {}
    if rope.scaling == "linear":
        return plain / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.scaling == "yarn":
        return _yarn(powers, rope), float(parameters["attention_factor"])
    return plain, 1.0


def _llama3(plain: Tensor, rope: Rope) -> Tensor:
    """Long waves are slowed by the factor, short ones stay, and those between are blended."""
    parameters = rope.parameters or {}
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context = parameters["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > context / low, plain / rope.factor, plain)
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, blended, scaled)


def _yarn(powers: Tensor, rope: Rope) -> Tensor:
    """Dimensions that turn often within the original window stay, the others are interpolated, with a ramp between."""
    parameters = rope.parameters or {}
    context = parameters["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return rope.dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(parameters["beta_fast"]), dimension(parameters["beta_slow"])
    if parameters["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    keep = 1 - ramp
    return (1.0 / (rope.factor * powers)) * (1 - keep) + (1.0 / powers) * keep


class RotaryTable:
    """Cosines and sines of every position used so far, fp32, half the head's width each.

    Memory: 4 * dim bytes a position, in blocks of 1024 positions, on ``device``.
    """

    def __init__(self, rope: Rope, device: torch.device | str = "cpu") -> None:
        frequencies, self._factor = inverse_frequencies(rope)
        self._frequencies = frequencies.to(device)
        self._cos = self._frequencies.new_empty((0, rope.dim // 2))
        self._sin = self._cos
        self._turns = self._cos

    def lookup(self, positions: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        """int64 [T] -> cos and sin, fp32 [T, dim / 2].

        ``length``: one more than the largest position; without it the table has to look (and a GPU to wait).
        """
        if length is None:
            length = int(positions.max()) + 1 if positions.numel() else 0
        self.reserve(length)
        return self._cos[positions], self._sin[positions]

    def turns(self, length: int) -> Tensor:
        """Cosines, then sines of the positions below ``length`` (and of more), fp32 [length or more, dim]."""
        self.reserve(length)
        if self._turns.shape[0] < length:
            self._turns = torch.cat([self._cos, self._sin], 1)
        return self._turns

    def reserve(self, length: int) -> None:
        """Compute the entries of all positions below ``length``."""
        have = self._cos.shape[0]
        if length <= have:
            return
        cos, sin = [self._cos], [self._sin]
        for start in range(have, length, _BLOCK):
            steps = torch.arange(start, start + _BLOCK, dtype=torch.float32, device=self._frequencies.device)
            angles = steps[:, None] * self._frequencies  # [block, dim / 2]
            cos.append(angles.cos() * self._factor)
            sin.append(angles.sin() * self._factor)
        self._cos, self._sin = torch.cat(cos), torch.cat(sin)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, dim], cos and sin [T, dim / 2] -> [T, heads, dim]: the halves of each head turned, in x's dtype."""
    if native.serves(x):
        from flexbatch.kernels import rows_numba  # Numba is there only where it is needed

        return rows_numba.rotate(x, cos, sin)
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    turned_first, turned_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return out
