"""Random packed weights, and how far a product is from the exact one; shared by the tests of both kinds of kernels."""

from __future__ import annotations

import random
from typing import get_args

import torch
from torch import Tensor

from flexbatch.compression.groups import GROUPS, Offset, Packed, groups_of, pack_codes


def random_packed(rng: random.Random, shape: tuple[int, int], group: int | None = None) -> Packed:
    torch.manual_seed(rng.randint(0, 1 << 30))
    group = group or rng.choice(GROUPS)
    per_group = (shape[0], groups_of(shape[1], group))
    scale_type = rng.choice([torch.float16, torch.bfloat16])
    offset = rng.choice(get_args(Offset))
    return Packed(
        pack_codes(torch.randint(0, 16, shape)),
        (torch.rand(per_group) * 0.02).to(scale_type),
        (torch.randn(per_group) * 0.1).to(scale_type) if offset == "minimum" else None,
        torch.randint(0, 17, per_group, dtype=torch.uint8) if offset == "zero" else None,
        group,
        shape,
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())
