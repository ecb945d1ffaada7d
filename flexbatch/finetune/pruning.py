"""Which activations backward needs, found out by trying: nothing here is a list kept by hand.

Two questions for every linear of a layer. Its input: kept exactly where the linear has an adapter, for no other
gradient is made of it. Its result: computed again exactly where some gradient depends on its numbers; a layer's last
product is only added to the residual, so that nobody reads it. The second is answered by an experiment: a small layer
of the same wiring is differentiated with the result replaced by other numbers, and all gradients are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexbatch.finetune.functions import Rotate
from flexbatch.models.registry import family_of
from flexbatch.models.spec import GroupSpec
from flexbatch.shapes import ModelShape

_ROWS, _HEAD_DIM, _INNER = 4, 8, 24


@dataclass(frozen=True, slots=True)
class Kept:
    """What backward holds of one linear: its ``input`` (it is trained), its ``result`` (a gradient depends on it)."""

    linear: str
    input: bool
    result: bool

    @property
    def reason(self) -> str:
        """Why, in words."""
        first = "input kept: dA = du' x reads it" if self.input else "input pruned: frozen weights get no gradient"
        second = "result computed again: a gradient depends on it" if self.result else "result pruned: only added"
        return f"{first}; {second}"


def kept_by(shape: ModelShape, group: int, trained: Iterable[str]) -> tuple[Kept, ...]:
    """What is kept of every linear of layer group ``group`` (from 1) whose linears ``trained`` have adapters."""
    chosen = frozenset(trained)
    small = _small(shape)
    spec = family_of(small).table(small).layers[group - 1]
    names = [linear.name for linear in spec.linears]
    plain = _gradients(small, spec, chosen, {})
    kept = []
    for name in names:
        others = [_gradients(small, spec, chosen, {name: seed}) for seed in (1, 2, 3)]
        changed = any(not torch.equal(one, two) for other in others for one, two in zip(plain, other, strict=True))
        kept.append(Kept(name, name in chosen, changed))
    return tuple(kept)


def shapes_only(shape: ModelShape, group: int, trained: Iterable[str]) -> frozenset[str]:
    """The linears of a layer whose results need not be computed again for backward."""
    return frozenset(each.linear for each in kept_by(shape, group, trained) if not each.result)


def _small(shape: ModelShape) -> ModelShape:
    """The same wiring with few and narrow heads."""
    shared = shape.num_kv_heads < shape.num_heads
    heads = 4
    rope = None if shape.rope is None else replace(shape.rope, dim=_HEAD_DIM)
    return replace(
        shape,
        hidden_size=heads * _HEAD_DIM,
        embed_dim=heads * _HEAD_DIM,
        num_heads=heads,
        num_kv_heads=heads // 2 if shared else heads,
        head_dim=_HEAD_DIM,
        intermediate_size=_INNER,
        vocab_size=8,
        max_positions=_ROWS,
        rope=rope,
    )


class _Fixed(torch.autograd.Function):
    """A linear of fixed numbers: what it returns, and what it adds to gradients, are given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, result: Tensor, seen: list[Tensor], keeps: bool) -> Tensor:
        ctx.weight, ctx.seen = weight, seen
        if keeps:
            seen.append(x.detach().clone())  # dA reads the input
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        ctx.seen.append(gradients[0].clone())  # du, dB and dx read it
        return gradients[0] @ ctx.weight, None, None, None, None


@dataclass
class _Probe:
    """A layer context whose linears return what they are told, and which notes what gradients are made of."""

    shape: ModelShape
    spec: GroupSpec
    trained: frozenset[str]
    replaced: Mapping[str, int]
    seen: list[Tensor]
    positions: Tensor

    def linear(self, name: str, x: Tensor) -> Tensor:
        linear = next(each for each in self.spec.linears if each.name == name)
        weight = _numbers((linear.out_features, linear.in_features), 17)
        result = x.detach() @ weight.t()
        if name in self.replaced:
            result = _numbers(tuple(result.shape), 100 + self.replaced[name])
        made: Tensor = _Fixed.apply(x, weight, result, self.seen, name in self.trained)  # type: ignore[no-untyped-call]
        return made

    def vector(self, name: str) -> Tensor:
        return _numbers(next(each.shape for each in self.spec.vectors if each.name == name), 5)

    def embedding(self, name: str, ids: Tensor) -> Tensor:
        return self.vector(name).index_select(0, ids)  # whatever table a layer may have of its own

    def rotate(self, x: Tensor) -> Tensor:
        if self.shape.rope is None:
            return x
        angles = torch.linspace(0, 1, _ROWS * x.shape[2] // 2).view(_ROWS, -1)
        turned: Tensor = Rotate.apply(x, angles.cos(), angles.sin())  # type: ignore[no-untyped-call]
        return turned


def _numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _gradients(
    shape: ModelShape, spec: GroupSpec, trained: frozenset[str], replaced: Mapping[str, int]
) -> list[Tensor]:
    """Everything that gradients of a layer are made of, with the results of some linears replaced."""
    family = family_of(shape)
    seen: list[Tensor] = []
    context = _Probe(shape, spec, trained, replaced, seen, torch.arange(_ROWS))
    with torch.enable_grad():
        x = _numbers((_ROWS, shape.hidden_size), 7).requires_grad_()
        q, k, v = family.project(context, x)
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)).softmax(-1)
        attended = torch.einsum("hij,jhd->ihd", scores, v.repeat_interleave(group, 1))
        y = family.finish(context, x, attended)
    torch.autograd.backward([y], [_numbers(tuple(y.shape), 9)])
    assert x.grad is not None
    return [x.grad, *seen]
