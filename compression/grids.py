"""Fitting a grid of 16 equal steps to each group of numbers: plain range, search of the range, least squares.

Owns the choice of a scale and a minimum; knows nothing of weights, activations or the layout of what is packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexbatch.compression.groups import LEVELS

_TOP = LEVELS - 1
CUTS = (0.0, 0.05, 0.1, 0.15)
"""Fractions of a group's range that the search cuts off at either end; all pairs are tried."""
REFINEMENTS = 3


def nearest_codes(groups: Tensor, scales: Tensor, minimums: Tensor) -> Tensor:
    """Codes 0 .. 15, as fp32, of groups [N, n] on their grids [N, 1]; 0 where the scale is 0."""
    inverse = torch.where(scales == 0, torch.zeros_like(scales), scales.reciprocal())
    return groups.sub(minimums).mul_(inverse).round_().clamp_(0, _TOP)


def plain_range(groups: Tensor, scale_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale and minimum [N, 1] that span groups fp32 [N, n], as fp32 numbers of ``scale_type``."""
    lowest, highest = groups.aminmax(dim=-1, keepdim=True)
    return _stored((highest - lowest).div_(_TOP), scale_type), _stored(lowest, scale_type)


def searched_range(
    groups: Tensor,
    importance: Tensor,
    scale_type: torch.dtype,
    cuts: Sequence[float] = CUTS,
    refinements: int = REFINEMENTS,
) -> tuple[Tensor, Tensor]:
    """Return the scale and minimum [N, 1] with the least error found, squared and weighted by ``importance`` [N, n].

    The range is cut at both ends by every pair of ``cuts``; then, with the codes of the best pair kept, the weighted
    least-squares line through (code, number) gives a better scale and minimum, and these give new codes.
    """
    lowest, highest = groups.aminmax(dim=-1, keepdim=True)
    width = highest - lowest
    best = torch.full_like(lowest, torch.inf)
    scales, minimums = torch.full_like(best, torch.inf), torch.full_like(best, torch.inf)  # unless one fits
    buffer = torch.empty_like(groups)
    candidates = [(low, high) for low in cuts for high in cuts]
    for turn in range(len(candidates) + refinements):
        if turn < len(candidates):
            low, high = candidates[turn]
            scale = _stored(width * ((1 - low - high) / _TOP), scale_type)
            minimum = _stored(lowest + width * low, scale_type)
        else:
            scale, minimum = _line(groups, nearest_codes(groups, scales, minimums), importance, scale_type)
        inverse = torch.where(scale == 0, torch.zeros_like(scale), scale.reciprocal())
        torch.sub(groups, minimum, out=buffer)
        buffer.mul_(inverse).round_().clamp_(0, _TOP).mul_(scale).add_(minimum).sub_(groups)
        error = buffer.square_().mul_(importance).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        minimums = torch.where(better, minimum, minimums)
    return scales, minimums


def _line(groups: Tensor, codes: Tensor, importance: Tensor, scale_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weighted least-squares scale and minimum for given codes; a constant where all codes are the same."""
    weighted = importance * codes
    total = importance.sum(-1, keepdim=True)
    first = weighted.sum(-1, keepdim=True)
    second = (weighted * codes).sum(-1, keepdim=True)
    ours = (importance * groups).sum(-1, keepdim=True)
    cross = weighted.mul_(groups).sum(-1, keepdim=True)
    spread = total * second - first * first
    flat = spread <= 1e-6 * total * second
    spread = torch.where(flat, torch.ones_like(spread), spread)
    scale = torch.where(flat, torch.zeros_like(spread), (total * cross - first * ours) / spread)
    mean = ours / torch.where(total == 0, torch.ones_like(total), total)
    minimum = torch.where(flat, mean, (ours * second - first * cross) / spread)
    return _stored(scale, scale_type), _stored(minimum, scale_type)


def _stored(number: Tensor, scale_type: torch.dtype) -> Tensor:
    return number.to(scale_type).float()
