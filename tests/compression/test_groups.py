"""The packed format against a loop over single weights in exact rational arithmetic."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch

from flexbatch.compression.groups import (
    GROUPS,
    Offset,
    Packed,
    PackedLayout,
    dequantize,
    groups_of,
    pack_codes,
    row_bytes,
    unpack_codes,
)

SHAPES = [(1, 1), (1, 2), (3, 31), (2, 32), (5, 33), (4, 63), (2, 64), (3, 65), (7, 191), (2, 320), (1, 129), (6, 257)]


def random_packed(seed: int, shape: tuple[int, int], group: int, offset: Offset, scale_type: torch.dtype) -> Packed:
    torch.manual_seed(seed)
    out_features, in_features = shape
    per_group = (out_features, groups_of(in_features, group))
    return Packed(
        pack_codes(torch.randint(0, 16, shape)),
        (torch.rand(per_group) * 0.1).to(scale_type),
        torch.randn(per_group).to(scale_type) if offset == "minimum" else None,
        torch.randint(0, 17, per_group, dtype=torch.uint8) if offset == "zero" else None,
        group,
        shape,
    )


def nibble(packed: Packed, row: int, column: int) -> int:
    byte = int(packed.codes[row, column // 2])
    return byte >> 4 if column % 2 else byte & 15


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """The nearest fp32, then the nearest of ``dtype``: fp32 first, as the format says."""
    single = np.float32(value.numerator / value.denominator)
    return float(torch.tensor(single).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_the_identity(shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 16, (3, *shape))
    packed = pack_codes(codes)
    assert packed.shape == (3, shape[0], row_bytes(shape[1]))
    assert torch.equal(unpack_codes(packed, shape[1]).long(), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", get_args(Offset))
@pytest.mark.parametrize("seed", range(4))
def test_dequantize_equals_exact_arithmetic(seed: int, offset: Offset, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    shape = rng.choice(SHAPES)
    group = rng.choice(GROUPS)
    packed = random_packed(seed, shape, group, offset, rng.choice([torch.float16, torch.bfloat16]))
    weight = dequantize(packed, dtype)
    assert weight.dtype == dtype
    for row in range(shape[0]):
        for column in range(shape[1]):
            place = (row, column // group)
            scale, code = Fraction(float(packed.scales[place])), nibble(packed, row, column)
            if packed.zeros is not None:
                value = (code - int(packed.zeros[place])) * scale
            elif packed.minimums is None:
                value = (code - 8) * scale
            else:
                value = code * scale + Fraction(float(packed.minimums[place]))
            assert float(weight[row, column]) == rounded(value, dtype)


@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16])
def test_integer_zeros_equal_the_product_in_the_scales_type(scale_type: torch.dtype) -> None:
    # What GPTQ's and AWQ's own kernels compute: an exact integer times the scale, rounded once.
    packed = random_packed(0, (8, 256), 128, "zero", scale_type)
    assert packed.zeros is not None
    codes = unpack_codes(packed.codes, 256).view(8, 2, 128).short() - packed.zeros.short().unsqueeze(-1)
    expected = (codes.to(scale_type) * packed.scales.unsqueeze(-1)).view(8, 256)
    assert torch.equal(dequantize(packed, scale_type), expected)


@pytest.mark.parametrize("offset", get_args(Offset))
@pytest.mark.parametrize("shape", SHAPES)
def test_one_run_of_bytes_holds_it(shape: tuple[int, int], offset: Offset) -> None:
    packed = random_packed(1, shape, 64, offset, torch.bfloat16)
    layout = PackedLayout.of(packed)
    raw = torch.zeros(layout.nbytes, dtype=torch.uint8)
    target = layout.view(raw)
    for name, part in packed.tensors().items():
        target.tensors()[name].copy_(part)
    assert layout.nbytes == packed.nbytes == target.nbytes
    seen = layout.view(raw.clone())
    assert torch.equal(dequantize(seen), dequantize(packed))
    assert all(torch.equal(seen.tensors()[name], part) for name, part in packed.tensors().items())


def test_rows_share_memory_and_size_is_four_and_a_half_bits() -> None:
    packed = random_packed(2, (10, 128), 64, "minimum", torch.float16)
    part = packed.rows(3, 7)
    assert part.shape == (4, 128)
    assert part.codes.data_ptr() == packed.codes[3:].data_ptr()
    assert torch.equal(dequantize(part), dequantize(packed)[3:7])
    assert packed.bits_per_weight == 4.5
    out = torch.zeros(10, 128)
    assert dequantize(packed, out=out) is out
    assert torch.equal(out, dequantize(packed))


def test_large_weights_are_done_in_parts() -> None:
    packed = random_packed(3, (700, 1000), 64, "minimum", torch.float16)
    assert torch.equal(dequantize(packed)[693:], dequantize(packed.rows(693, 700)))
