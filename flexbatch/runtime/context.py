"""The context that a family's wiring runs in: one group's weights, bound to one micro-batch's positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexbatch.kernels.linear import linear
from flexbatch.kernels.rotary import apply_rotary
from flexbatch.memory.weights import GroupWeights
from flexbatch.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class BoundContext:
    """Implements ``models.spec.LayerContext``."""

    shape: ModelShape
    positions: Tensor
    weights: GroupWeights
    rotation: tuple[Tensor, Tensor] | None
    rows: Tensor | None = None

    def linear(self, name: str, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        operand = self.weights.linears[name]
        return linear(x, operand.parts, operand.bias)

    def vector(self, name: str) -> Tensor:
        """A small tensor of the group, in compute dtype."""
        return self.weights.vectors[name]

    def embedding(self, name: str, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, width], widened to compute dtype after the look-up (``rows``: it was made already)."""
        table = self.weights.tables.get(name)
        if table is None:
            assert self.rows is not None, "a table that rests elsewhere was not gathered from"
            return self.rows.to(ids.device, non_blocking=True).to(self.weights.dtype)
        return table.index_select(0, ids).to(self.weights.dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim] with rotary position embedding applied; unchanged in a model without one."""
        return x if self.rotation is None else apply_rotary(x, *self.rotation)
