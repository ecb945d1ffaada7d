"""The weights of one group as operands of products, wherever their bytes rest. Knows no wiring and no schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexbatch.kernels.linear import Weight, linear


@dataclass(frozen=True, slots=True)
class Operand:
    """One linear: parts [out_i, in] whose outputs stand side by side, in the form they rest in; bias [out]."""

    parts: tuple[Weight, ...]
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]: the product with all parts, and the bias."""
        return linear(x, self.parts, self.bias)


@dataclass(slots=True)
class GroupWeights:
    """What one visit of a sweep needs: ``linears`` by name, ``vectors`` in compute ``dtype``, look-up ``tables``."""

    dtype: torch.dtype
    linears: dict[str, Operand] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
