"""The activation functions that a ``config.json`` may name, each as transformers computes it.

Knows names and formulas only; which names are accepted is checked where configurations are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from flexbatch.kernels import native


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_fast": _gelu_fast,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""Elementwise functions by their name in ``config.json``."""


def activate(name: str, x: Tensor) -> Tensor:
    """Return ``name`` applied to every element of ``x``."""
    return ACTIVATIONS[name](x)


def gated(name: str, gate_up: Tensor) -> Tensor:
    """[T, 2 * width]: gates, then what they weigh -> ``name`` of the gates, times the others [T, width]."""
    if ACTIVATIONS[name] is functional.silu and native.serves(gate_up):
        from flexbatch.kernels import rows_numba  # Numba is there only where it is needed

        return rows_numba.gated_silu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(name, gate).mul_(up)
