"""Layer norm and RMS norm over the last dimension, in the order of operations that transformers uses.

Knows nothing of models; weights come in compute dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from flexbatch.kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., dim] -> [..., dim]: x / rms(x) in fp32, cast back, then times ``weight`` [dim] (arXiv 1910.07467)."""
    if x.dtype == torch.float32:
        return functional.rms_norm(x, weight.shape, weight, eps)  # the same operations in one pass
    if x.dim() == 2 and native.serves(x, weight):
        from flexbatch.kernels import rows_numba  # Numba is there only where it is needed

        return rows_numba.rms_norm(x, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """[..., dim] -> [..., dim]: layer norm; ``weight`` and ``bias`` [dim], or None without affine (1607.06450)."""
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
