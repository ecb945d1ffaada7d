"""What a family file declares and what it is given: tables of weight names, and the context its wiring runs in.

Knows nothing of tiers, of where a weight lies, of its precision or of adapters: those stand behind ``LayerContext``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from flexbatch.policy.footprint import GroupSize, ModelSize
from flexbatch.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One linear module of the checkpoint, e.g. ``self_attn.q_proj``; also the name an adapter targets it by."""

    module: str
    out_features: int


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One matrix product of the wiring: the parts' rows are stacked along the output (q, k and v become one product).

    ``transposed``: the checkpoint stores [in, out] (GPT-2's Conv1D) instead of [out, in].
    """

    name: str
    in_features: int
    parts: tuple[LinearPart, ...]
    bias: bool
    transposed: bool = False

    @property
    def out_features(self) -> int:
        """Rows of the stacked matrix."""
        return sum(part.out_features for part in self.parts)

    def weight_shape(self, part: LinearPart) -> tuple[int, int]:
        """Return the shape of one part's weight as the checkpoint stores it."""
        stored = (part.out_features, self.in_features)
        return stored[::-1] if self.transposed else stored


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """A small tensor (a norm's weight or bias, an embedding table): ``tensor`` is its checkpoint name in the group."""

    name: str
    tensor: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """The weights that one visit of a sweep needs together: the embedding, one layer, or the head.

    ``prefix`` is put before every checkpoint name of the group (``model.layers.3.``).
    """

    name: str
    prefix: str
    linears: tuple[LinearSpec, ...] = ()
    vectors: tuple[VectorSpec, ...] = ()

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield full name and stored shape of every tensor of the group."""
        for linear in self.linears:
            for part in linear.parts:
                yield f"{self.prefix}{part.module}.weight", linear.weight_shape(part)
                if linear.bias:
                    yield f"{self.prefix}{part.module}.bias", (part.out_features,)
        for vector in self.vectors:
            yield f"{self.prefix}{vector.tensor}", vector.shape


@dataclass(frozen=True, slots=True)
class WeightTable:
    """All groups of a model, in the order a sweep visits them.

    ``optional_prefix``: checkpoints exist that leave this leading part of every name out, or add it.
    ``ignored``: names (regular expressions, whole match) that old checkpoints carry and nobody needs.
    ``tied``: pairs (absent tensor, tensor that stands for it), full names; the head's ``lm_head.weight`` stays in
    its group's table, and a checkpoint gives both names one and the same entry.
    """

    embed: GroupSpec
    layers: tuple[GroupSpec, ...]
    head: GroupSpec
    optional_prefix: str = ""
    ignored: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = field(default=())

    @property
    def groups(self) -> tuple[GroupSpec, ...]:
        """Embedding, layers, head."""
        return (self.embed, *self.layers, self.head)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return full name and stored shape of every tensor of the model, tied ones included."""
        return {name: shape for group in self.groups for name, shape in group.tensors()}

    def transposed(self) -> set[str]:
        """Return the full names of the weights that checkpoints store [in, out]."""
        return {
            f"{group.prefix}{part.module}.weight"
            for group in self.groups
            for linear in group.linears
            if linear.transposed
            for part in linear.parts
        }


class LayerContext(Protocol):
    """What wiring sees of the rest: T tokens of one micro-batch at one group."""

    @property
    def shape(self) -> ModelShape:
        """The model's shapes."""

    @property
    def positions(self) -> Tensor:
        """Position of each token in its sequence, int64 [T]."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]: the LinearSpec ``name`` of this group, bias and adapters included."""

    def vector(self, name: str) -> Tensor:
        """The VectorSpec ``name`` of this group, in compute dtype."""

    def embedding(self, name: str, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, width]: rows of the table ``name`` of this group, in compute dtype."""

    def rotate(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim] -> the same, rotary position embedding applied."""


class Family(Protocol):
    """The wiring of one architecture; attention itself lies between ``project`` and ``finish``."""

    def table(self, shape: ModelShape) -> WeightTable:
        """Names and shapes of every weight."""

    def embed(self, ctx: LayerContext, ids: Tensor) -> Tensor:
        """int64 [T] -> hidden states [T, hidden]."""

    def project(self, ctx: LayerContext, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden] -> q [T, heads, head_dim], k and v [T, kv_heads, head_dim]."""

    def finish(self, ctx: LayerContext, x: Tensor, attended: Tensor) -> Tensor:
        """[T, hidden], attended [T, heads, head_dim] -> the layer's output [T, hidden]."""

    def head(self, ctx: LayerContext, x: Tensor) -> Tensor:
        """[T, hidden] -> logits [T, vocab]."""


def model_size(shape: ModelShape, table: WeightTable) -> ModelSize:
    """Elements of every group; a tensor that an earlier group already has (a tied head) is counted once."""
    ties = dict(table.tied)
    seen: set[str] = set()
    groups: list[GroupSize] = []
    for group in table.groups:
        matrices = shared = 0
        vectors = 0
        for linear in group.linears:
            for part in linear.parts:
                name = f"{group.prefix}{part.module}.weight"
                elements = part.out_features * linear.in_features
                if ties.get(name, name) in seen:
                    shared += elements
                else:
                    matrices += elements
                seen.add(ties.get(name, name))
                vectors += part.out_features if linear.bias else 0
        for vector in group.vectors:
            name = group.prefix + vector.tensor
            if ties.get(name, name) not in seen:
                vectors += math.prod(vector.shape)
            seen.add(ties.get(name, name))
        groups.append(GroupSize(group.name, matrices, vectors, shared))
    return ModelSize(shape, tuple(groups))
