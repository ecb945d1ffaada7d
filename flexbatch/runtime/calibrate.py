"""Packing a model's layers one after the other so that their outputs on a sample of text change least.

Runs each layer in fp32, with the layers before it and the weights before a weight already packed. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flexbatch.checkpoint.four_bits import wide_weight
from flexbatch.checkpoint.packed import packable
from flexbatch.checkpoint.tensors import Checkpoint
from flexbatch.compression.feedback import InputMoments, quantize_calibrated
from flexbatch.compression.groups import Packed
from flexbatch.errors import ModelError
from flexbatch.kernels.linear import Weight, linear
from flexbatch.kernels.rotary import RotaryTable, apply_rotary
from flexbatch.models.registry import family_of
from flexbatch.models.spec import GroupSpec
from flexbatch.shapes import ModelShape

Seen = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Context:
    """One group over one sequence: ``models.spec.LayerContext``; ``seen`` is told every linear's inputs."""

    shape: ModelShape
    positions: Tensor
    group: GroupSpec
    tensors: Mapping[str, Weight]
    rotation: tuple[Tensor, Tensor] | None
    seen: Seen

    def linear(self, name: str, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        self.seen(name, x)
        spec = next(spec for spec in self.group.linears if spec.name == name)
        modules = [f"{self.group.prefix}{part.module}" for part in spec.parts]
        product = linear(x, [self.tensors[f"{module}.weight"] for module in modules])
        return product + torch.cat([self._dense(f"{module}.bias") for module in modules]) if spec.bias else product

    def vector(self, name: str) -> Tensor:
        """A small tensor of the group, or an embedding table."""
        spec = next(spec for spec in self.group.vectors if spec.name == name)
        return self._dense(f"{self.group.prefix}{spec.tensor}")

    def embedding(self, name: str, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, width]."""
        return self.vector(name).index_select(0, ids)

    def rotate(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim] with rotary position embedding applied; unchanged in a model without one."""
        return x if self.rotation is None else apply_rotary(x, *self.rotation)

    def _dense(self, name: str) -> Tensor:
        found = self.tensors[name]
        assert isinstance(found, Tensor)
        return found


class Calibrator:
    """Packs layer after layer, from the first one to the last, for the token ids ``texts``.

    Memory: one layer in fp32, the second moments of its widest linear's inputs, the hidden states of all texts.
    """

    def __init__(self, shape: ModelShape, checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> None:
        self._shape = shape
        self._family = family_of(shape)
        self._table = self._family.table(shape)
        self._checkpoint = checkpoint
        self._kinds = packable(self._table)
        self._rotary = None if shape.rope is None else RotaryTable(shape.rope)
        tensors = self._load(self._table.embed)
        with torch.inference_mode():
            self._hidden = [
                self._family.embed(self._context(self._table.embed, tensors, len(text)), torch.tensor(text))
                for text in texts
            ]
        self._next = 0

    def pack(self, layer: int) -> dict[str, Packed]:
        """Pack the linear weights of ``layer`` that are not packed as they are stored, and go on to the next layer."""
        assert layer == self._next
        group = self._table.layers[layer]
        tensors = self._load(group)
        made: dict[str, Packed] = {}
        with torch.inference_mode():
            for spec in group.linears:
                names = [f"{group.prefix}{part.module}.weight" for part in spec.parts]
                names = [name for name in names if isinstance(tensors[name], Tensor)]
                if not names:
                    continue
                moments = self._moments(layer, tensors, spec.name, spec.in_features)
                for name in names:
                    weight = tensors[name]
                    assert isinstance(weight, Tensor)
                    try:
                        made[name] = tensors[name] = quantize_calibrated(weight, moments)
                    except ModelError as error:
                        raise ModelError(f"tensor {name}: {error}") from error
            self._advance(layer, tensors)
        return made

    def pass_over(self, layer: int, packed: Mapping[str, Packed]) -> None:
        """Go on to the layer after ``layer``, whose weights were packed before: some of them are ``packed``."""
        assert layer == self._next
        with torch.inference_mode():
            self._advance(layer, {**self._load(self._table.layers[layer]), **packed})

    def _moments(self, layer: int, tensors: Mapping[str, Weight], name: str, in_features: int) -> Tensor:
        moments = InputMoments(in_features)

        def count(linear_name: str, x: Tensor) -> None:
            if linear_name == name:
                moments.add(x)

        for x in self._hidden:
            self._run(layer, tensors, x, count)
        return moments.total

    def _advance(self, layer: int, tensors: Mapping[str, Weight]) -> None:
        self._hidden = [self._run(layer, tensors, x, lambda _name, _x: None) for x in self._hidden]
        self._next += 1

    def _run(self, layer: int, tensors: Mapping[str, Weight], x: Tensor, seen: Seen) -> Tensor:
        context = self._context(self._table.layers[layer], tensors, x.shape[0], seen)
        q, k, v = self._family.project(context, x)
        return self._family.finish(context, x, self._attend(layer, q, k, v))

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [T, heads, dim], k and v [T, kv_heads, dim] of one sequence -> [T, heads, dim]."""
        repeat, window = self._shape.num_heads // self._shape.num_kv_heads, self._shape.windows[layer]
        places = torch.arange(q.shape[0])
        distance = places[:, None] - places[None]
        mask = (distance >= 0) & (distance < (window or q.shape[0]))
        keys, values = (part.repeat_interleave(repeat, 1).transpose(0, 1) for part in (k, v))
        scale = self._shape.scale_of(layer)
        attended = functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=mask, scale=scale)
        return attended.transpose(0, 1).contiguous()

    def _context(
        self, group: GroupSpec, tensors: Mapping[str, Weight], length: int, seen: Seen = lambda _name, _x: None
    ) -> _Context:
        positions = torch.arange(length)
        rotation = None if self._rotary is None else self._rotary.lookup(positions, length)
        return _Context(self._shape, positions, group, tensors, rotation, seen)

    def _load(self, group: GroupSpec) -> dict[str, Weight]:
        """All tensors of a group: those that are stored packed as they are, others in fp32, matrices [out, in]."""
        found: dict[str, Weight] = {}
        for name, _ in group.tensors():
            entry = self._checkpoint.entries[name]
            if entry.layout is not None:
                found[name] = entry.layout.view(self._checkpoint.raw(entry))
            elif name in self._kinds:
                found[name] = wide_weight(self._checkpoint, name, self._kinds[name]).float()
            else:
                found[name] = self._checkpoint.read(entry).float()
        return found
