"""The context that a family's wiring runs in: one group's weights, bound to one micro-batch's positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexbatch.kernels.rotary import apply_rotary
from flexbatch.memory.weights import GroupWeights
from flexbatch.runtime.adapter_store import BoundAdapters
from flexbatch.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class BoundContext:
    """Implements ``models.spec.LayerContext`` for the group ``group``; ``adapters``: those that rows name."""

    shape: ModelShape
    positions: Tensor
    weights: GroupWeights
    rotation: tuple[Tensor, Tensor] | None
    rows: Tensor | None = None
    group: int = 0
    adapters: BoundAdapters | None = None

    def linear(self, name: str, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]. Rows without an adapter are what they would be if there were none."""
        product = self.weights.linears[name].forward(x)
        if self.adapters is not None:
            self.adapters.add(self.group, name, x, product)
        return product

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
