"""What backward needs beside torch's own derivatives: linears of frozen weights with adapters, and rotation.

With y = x W' + s u B' and u = x A', backward reads x and dy only: du = s dy B, dB = s dy' u, dA = du' x,
dx = dy W + du A. Frozen weights get no gradient, so the input of a linear without an adapter is not kept.

Factors and the sums of their gradients are fp32. Where activations are bf16 and the processor multiplies it, factors
are rounded to it for each product as under autocast: a quarter of the time of fp32, which would be a fifth of a step.
fp16 has too small a range for gradients that nobody scales, so that its activations are widened instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexbatch.finetune.dropout import Dropout
from flexbatch.finetune.parameters import LinearFactors
from flexbatch.kernels.linear import Weight, has_onednn, linear, linear_backward
from flexbatch.kernels.rotary import apply_rotary
from flexbatch.memory.weights import Operand


def backward_product(dy: Tensor, operand: Operand, outputs: Sequence[int]) -> Tensor:
    """From dy [T, out] to dy @ W [T, in], in dy's type.

    ``outputs``: those of each module of the linear. Sums are made module by module, so that they do not depend on
    whether a linear rests as one matrix or as several.
    """
    total: Tensor | None = None
    column = 0
    for rows in _modules(operand.parts, outputs):
        product = linear_backward(dy[:, column : column + rows.shape[0]], rows)
        total = product if total is None else total.add_(product)
        column += rows.shape[0]
    assert total is not None
    return total


def _modules(parts: Sequence[Weight], outputs: Sequence[int]) -> Iterator[Weight]:
    """The weight [out_i, in] of each module."""
    if len(parts) == len(outputs):
        yield from parts
        return
    (stacked,) = parts
    assert isinstance(stacked, Tensor), "weights in 4 bits lie module by module"
    yield from (stacked.to_dense() if stacked.is_mkldnn else stacked).split(list(outputs))


@dataclass(frozen=True, slots=True)
class AdaptedProduct:
    """One linear at work: the frozen ``operand`` of modules with so many ``outputs``, and its ``factors``.

    ``valued``: whether anything reads the numbers of the result; if not only its shape is (see ``pruning``).
    Gradients of the factors are multiplied by ``weight`` and added to those that ``factors`` holds.
    """

    operand: Operand
    outputs: tuple[int, ...]
    factors: LinearFactors | None
    dropout: Dropout | None
    weight: float
    valued: bool = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, in] -> [T, out], and u [T, sum of ranks] where there are adapters."""
        if self.valued:
            y = linear(x, self.operand.parts, self.operand.bias)
        else:
            y = x.new_zeros(x.shape[0], sum(self.outputs))
        if self.factors is None:
            return y, None
        u = self._inner(x, self.factors)
        if self.valued:
            for part in self.factors.parts:
                own, b = y[:, part.columns], part.b.to(u.dtype)
                if y.dtype == u.dtype:
                    own.addmm_(u[:, part.rows], b.t(), alpha=part.scale)
                else:
                    own += (part.scale * (u[:, part.rows] @ b.t())).to(y.dtype)
        return y, u

    def backward(self, dy: Tensor, x: Tensor | None, u: Tensor | None, *, wanted: bool) -> Tensor | None:
        """From dy [T, out] to dx [T, in] if it is ``wanted``; adds to the gradients of the factors."""
        dx = backward_product(dy, self.operand, self.outputs) if wanted else None
        factors = self.factors
        if factors is None:
            return dx
        assert x is not None
        assert u is not None
        x, dy, a = x.to(u.dtype), dy.to(u.dtype), factors.a.to(u.dtype)
        du = torch.empty_like(u)
        for part in factors.parts:
            own = dy[:, part.columns]
            torch.mm(own, part.b.to(u.dtype), out=du[:, part.rows]).mul_(part.scale)
            _add_product(part.b_gradient, own.t(), u[:, part.rows], self.weight * part.scale)
        if self.dropout is None:
            _add_product(factors.a_gradient, du.t(), x, self.weight)
            if dx is not None:
                _add_product(dx, du, a, 1.0)
            return dx
        for part in factors.parts:
            own = du[:, part.rows]
            _add_product(factors.a_gradient[part.rows], own.t(), self.dropout.apply(x, part.key), self.weight)
            if dx is not None:
                dx.add_(self.dropout.apply(own @ a[part.rows], part.key).to(dx.dtype))
        return dx

    def _inner(self, x: Tensor, factors: LinearFactors) -> Tensor:
        narrow = x.dtype == torch.bfloat16 and (x.device.type != "cpu" or has_onednn(x))
        dtype = x.dtype if narrow else factors.a.dtype
        x, a = x.to(dtype), factors.a.to(dtype)
        if self.dropout is None:
            return x @ a.t()
        inner = x.new_empty(x.shape[0], a.shape[0])
        for part in factors.parts:
            torch.mm(self.dropout.apply(x, part.key), a[part.rows].t(), out=inner[:, part.rows])
        return inner


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``total += scale * left @ right``, whose sums are rounded to the type of its operands if ``total`` is wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_((left @ right).to(total.dtype), alpha=scale)


class AdaptedLinear(torch.autograd.Function):
    """``AdaptedProduct`` under autograd. ``anchor`` requires a gradient where factors do, and never gets one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, product: AdaptedProduct) -> Tensor:  # noqa: ARG004
        """[T, in] -> [T, out]."""
        y, u = product.forward(x)
        if y._is_view():  # families change results in place, which autograd forbids for views made in here
            y = torch.empty(0, dtype=y.dtype, device=y.device).set_(
                y.untyped_storage(), y.storage_offset(), y.shape, y.stride()
            )
        ctx.product = product
        ctx.save_for_backward(*(() if u is None else (x, u)))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        """The gradient of x; those of the factors go to where they are summed."""
        x, u = ctx.saved_tensors or (None, None)
        return ctx.product.backward(gradients[0], x, u, wanted=ctx.needs_input_grad[0]), None, None


class Rotate(torch.autograd.Function):
    """Rotary position embedding: the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, heads, dim] -> the same, turned."""
        ctx.rotation = cos, sin
        return apply_rotary(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        cos, sin = ctx.rotation
        return apply_rotary(gradients[0], cos, -sin), None, None
