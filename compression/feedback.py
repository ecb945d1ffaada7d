"""Calibrated 4-bit weights: rounding whose error is fed back into the weights not yet rounded, and descent after it.

The error that counts is that of the outputs on sampled inputs x, (w - w')' H (w - w') with H = sum of x x'. GPTQ
(Frantar et al., 2022) gives the order of rounding; coordinate descent on codes, scales and minimums refines the result
(in the manner of QuantEase, Behdin et al., 2023). Knows nothing of how the inputs were sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexbatch.compression.grids import searched_range
from flexbatch.compression.groups import LEVELS, SCALE_TYPES, Packed, groups_of, pack_codes
from flexbatch.compression.quantize import importance_of, refuse_unfit, split_groups

_TOP = LEVELS - 1
_ROWS = 2048  # output rows at a time: they are independent of each other, so this bounds memory only


class InputMoments:
    """Accumulates the second moments of a linear layer's inputs: fp32 [in, in], in place."""

    def __init__(self, in_features: int) -> None:
        self.total = torch.zeros(in_features, in_features)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Count the inputs x [..., in]."""
        flat = x.reshape(-1, x.shape[-1]).float()
        self.total.addmm_(flat.t(), flat)
        self.rows += flat.shape[0]


def quantize_calibrated(
    weight: Tensor,
    moments: Tensor,
    *,
    group: int = 64,
    damping: float = 0.01,
    sweeps: int = 1,
    scale_type: torch.dtype = torch.float16,
) -> Packed:
    """Pack weight [out, in] so that its outputs on inputs of second moments ``moments`` [in, in] change least.

    ``damping`` times the mean diagonal is added to the diagonal, which also makes few samples sufficient; ``sweeps`` of
    descent follow the error-feedback rounding. Takes about (2 + 4 sweeps) * out * in^2 operations. Raises
    ``ModelError`` for what is not finite or out of range.
    """
    assert scale_type in SCALE_TYPES
    out_features, in_features = weight.shape
    hessian, feedback = _factor(moments, damping)
    codes = torch.empty(out_features, in_features, dtype=torch.uint8)
    scales = torch.empty(out_features, groups_of(in_features, group), dtype=scale_type)
    minimums = torch.empty_like(scales)
    for start in range(0, out_features, _ROWS):
        rows = slice(start, start + _ROWS)
        part = _Rows(weight[rows].float(), group, scale_type)
        part.round_with_feedback(feedback, hessian.diagonal())
        for _ in range(sweeps):
            part.descend(hessian)
        codes[rows], scales[rows], minimums[rows] = part.codes, part.scales, part.minimums
    refuse_unfit(scales, minimums)
    return Packed(pack_codes(codes), scales, minimums, None, group, (out_features, in_features))


def _factor(moments: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped matrix, and the upper Cholesky factor of its inverse, both fp32."""
    damped = moments.double()
    mean = float(damped.diagonal().mean())
    damped = damped + torch.eye(damped.shape[0], dtype=torch.float64) * (damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return damped.float(), torch.linalg.cholesky(inverse, upper=True).float()


class _Rows:
    """Some rows of a weight on their way to codes: fp32 throughout, [rows, in] and [rows, groups]."""

    def __init__(self, weight: Tensor, group: int, scale_type: torch.dtype) -> None:
        rows, in_features = weight.shape
        self.weight = weight
        self.group = group
        self.scale_type = scale_type
        self.codes = torch.empty_like(weight)
        self.rounded = torch.empty_like(weight)
        self.scales = weight.new_empty(rows, groups_of(in_features, group))
        self.minimums = torch.empty_like(self.scales)

    def _columns(self) -> list[slice]:
        in_features = self.weight.shape[1]
        return [slice(start, min(start + self.group, in_features)) for start in range(0, in_features, self.group)]

    def round_with_feedback(self, feedback: Tensor, diagonal: Tensor) -> None:
        """Round column after column, each rounding error spread over the columns that follow."""
        current = self.weight.clone()
        for number, columns in enumerate(self._columns()):
            block = current[:, columns]
            inputs = diagonal[columns] / diagonal[columns].mean()
            importance = importance_of(block, self.group, inputs)
            scale, minimum = searched_range(split_groups(block, self.group), importance, self.scale_type)
            self.scales[:, number], self.minimums[:, number] = scale[:, 0], minimum[:, 0]
            errors = torch.empty_like(block)
            factor = feedback[columns, columns]
            for column in range(block.shape[1]):
                value = block[:, column]
                rounded = self._place(value, number, columns.start + column)
                errors[:, column] = (value - rounded) / factor[column, column]
                block[:, column + 1 :].addr_(errors[:, column], factor[column, column + 1 :], alpha=-1)
            current[:, columns.stop :].addmm_(errors, feedback[columns, columns.stop :], alpha=-1)

    def descend(self, hessian: Tensor) -> None:
        """Give every code in turn, then every group's scale and minimum, its best value with all others kept."""
        gradient = (self.weight - self.rounded) @ hessian
        for number, columns in enumerate(self._columns()):
            local = hessian[columns, columns]
            before = self.rounded[:, columns].clone()
            pull = gradient[:, columns].clone()
            for column in range(before.shape[1]):
                old = before[:, column]
                wanted = old + pull[:, column] / local[column, column]
                change = self._place(wanted, number, columns.start + column) - old
                pull.addr_(change, local[column], alpha=-1)
            self._refit(number, columns, local, pull)
            gradient.addmm_(self.rounded[:, columns] - before, hessian[columns], alpha=-1)

    def _place(self, wanted: Tensor, number: int, column: int) -> Tensor:
        """Set a column's codes to the nearest of ``wanted`` on the grid; return where that is."""
        scale, minimum = self.scales[:, number], self.minimums[:, number]
        inverse = torch.where(scale == 0, torch.zeros_like(scale), scale.reciprocal())
        codes = (wanted - minimum).mul_(inverse).round_().clamp_(0, _TOP)
        self.codes[:, column] = codes
        self.rounded[:, column] = torch.addcmul(minimum, codes, scale)
        return self.rounded[:, column]

    def _refit(self, number: int, columns: slice, local: Tensor, pull: Tensor) -> None:
        """The best change of a group's scale and minimum for its codes: two equations in two unknowns for each row."""
        codes = self.codes[:, columns]
        weighted = codes @ local
        second = (weighted * codes).sum(1)
        first = weighted.sum(1)
        total = local.sum()
        along, across = (codes * pull).sum(1), pull.sum(1)
        spread = second * total - first * first
        flat = spread <= 1e-6 * second * total
        spread = torch.where(flat, torch.ones_like(spread), spread)
        still = torch.zeros_like(spread)
        scale = self.scales[:, number] + torch.where(flat, still, (along * total - first * across) / spread)
        minimum = self.minimums[:, number] + torch.where(flat, still, (second * across - first * along) / spread)
        scale, minimum = scale.to(self.scale_type).float(), minimum.to(self.scale_type).float()
        self.scales[:, number], self.minimums[:, number] = scale, minimum
        self.rounded[:, columns] = codes * scale.unsqueeze(1) + minimum.unsqueeze(1)
