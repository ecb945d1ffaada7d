"""The context that a family's wiring runs in while an adapter is trained: as for inference, and differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexbatch.finetune.dropout import Dropout
from flexbatch.finetune.functions import AdaptedLinear, AdaptedProduct, Rotate
from flexbatch.finetune.parameters import Parameters
from flexbatch.memory.weights import GroupWeights
from flexbatch.shapes import ModelShape

_NONE: frozenset[str] = frozenset()


def _anchor() -> Tensor:
    return torch.zeros((), requires_grad=True)


@dataclass(frozen=True, slots=True)
class LearningContext:
    """Implements ``models.spec.LayerContext`` for the group ``group`` and T tokens at ``positions``.

    ``shapes_only``: linears whose results nothing reads but for their shape. ``weight`` is what gradients of factors
    are multiplied by. ``outputs``: of each module of every linear. ``rows``: of the token embedding, where the table
    rests elsewhere.
    """

    shape: ModelShape
    positions: Tensor
    weights: GroupWeights
    rotation: tuple[Tensor, Tensor] | None
    group: int
    parameters: Parameters
    outputs: Mapping[str, tuple[int, ...]]
    weight: float = 1.0
    dropout: Dropout | None = None
    rows: Tensor | None = None
    shapes_only: frozenset[str] = _NONE
    anchor: Tensor = field(default_factory=_anchor)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], adapters included."""
        factors = self.parameters.of(self.group, name)
        product = AdaptedProduct(
            self.weights.linears[name],
            self.outputs[name],
            factors,
            self.dropout,
            self.weight,
            name not in self.shapes_only,
        )
        if not torch.is_grad_enabled():
            return product.forward(x)[0]
        result: Tensor = AdaptedLinear.apply(x, None if factors is None else self.anchor, product)  # type: ignore[no-untyped-call]
        return result

    def vector(self, name: str) -> Tensor:
        """A small tensor of the group, in compute dtype."""
        return self.weights.vectors[name]

    def embedding(self, name: str, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, width], in compute dtype."""
        table = self.weights.tables.get(name)
        if table is None:
            assert self.rows is not None, "a table that rests elsewhere was not gathered from"
            return self.rows.to(ids.device).to(self.weights.dtype)
        return table.index_select(0, ids).to(self.weights.dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim] with rotary position embedding applied; unchanged in a model without one."""
        if self.rotation is None:
            return x
        rotated: Tensor = Rotate.apply(x, *self.rotation)  # type: ignore[no-untyped-call]
        return rotated
