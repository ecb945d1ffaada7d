"""The plainest way to run a family: weights in a dict, one sequence, attention as a loop over nothing clever."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.kernels.rotary import RotaryTable, apply_rotary
from flexbatch.models.registry import family_of
from flexbatch.models.spec import GroupSpec
from flexbatch.shapes import ModelShape


class NaiveContext:
    """The whole of ``LayerContext`` over plain fp32 tensors."""

    def __init__(self, shape: ModelShape, group: GroupSpec, weights: Mapping[str, Tensor], positions: Tensor) -> None:
        self.shape = shape
        self.positions = positions
        self._group = group
        self._weights = weights
        self._linears = {linear.name: linear for linear in group.linears}
        self._vectors = {vector.name: vector for vector in group.vectors}
        self._rotary = RotaryTable(shape.rope) if shape.rope else None

    def linear(self, name: str, x: Tensor) -> Tensor:
        spec = self._linears[name]
        outputs = []
        for part in spec.parts:
            full = f"{self._group.prefix}{part.module}"
            weight = self._weights[f"{full}.weight"]
            product = x @ (weight if spec.transposed else weight.T)
            outputs.append(product + self._weights[f"{full}.bias"] if spec.bias else product)
        return torch.cat(outputs, dim=-1)

    def vector(self, name: str) -> Tensor:
        return self._weights[f"{self._group.prefix}{self._vectors[name].tensor}"]

    def embedding(self, name: str, ids: Tensor) -> Tensor:
        return self.vector(name)[ids]

    def rotate(self, x: Tensor) -> Tensor:
        assert self._rotary is not None
        cos, sin = self._rotary.lookup(self.positions)
        return apply_rotary(x, cos, sin)


def attend(shape: ModelShape, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [T, heads, dim], k and v [T, kv_heads, dim] of one sequence -> [T, heads, dim]."""
    repeat = shape.num_heads // shape.num_kv_heads
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * shape.scale_of(layer)
    rows = torch.arange(q.shape[0])
    distance = rows[:, None] - rows[None, :]
    window = shape.windows[layer]
    hidden = (distance < 0) | (distance >= (window or q.shape[0]))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def load_weights(path: Path) -> tuple[ModelShape, dict[str, Tensor]]:
    """Read all weights of a folder through the checkpoint reader, as fp32."""
    folder = locate(str(path))
    checkpoint = open_checkpoint(folder, family_of(folder.shape).table(folder.shape))
    return folder.shape, {name: checkpoint.read(entry).float() for name, entry in checkpoint.entries.items()}


def logits_of(shape: ModelShape, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """int64 [T] -> logits [T, vocab]."""
    family = family_of(shape)
    table = family.table(shape)
    positions = torch.arange(ids.shape[0])
    x = family.embed(NaiveContext(shape, table.embed, weights, positions), ids)
    for index, group in enumerate(table.layers):
        ctx = NaiveContext(shape, group, weights, positions)
        q, k, v = family.project(ctx, x)
        x = family.finish(ctx, x, attend(shape, index, q, k, v))
    return family.head(NaiveContext(shape, table.head, weights, positions), x)
