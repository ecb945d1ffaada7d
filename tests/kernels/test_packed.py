"""Products with packed weights against fp64 products with the dequantized ones."""

from __future__ import annotations

import random

import pytest
import torch

from flexbatch.compression.groups import PackedLayout, dequantize
from flexbatch.kernels import linear as kernels
from flexbatch.kernels.linear import Weight, linear, linear_backward
from flexbatch.kernels.packed import METHODS, unpacked_tiles
from tests.kernels.packed_cases import distance, random_packed


@pytest.mark.parametrize("seed", range(24))
def test_products_equal_those_of_the_dequantized_weight(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    in_features = rng.choice([1, 31, 64, 127, 128, 320, 515, 1000])
    tile = 4 * in_features * rng.choice([1, 7, 64])
    monkeypatch.setattr(kernels, "tile_bytes", lambda _: tile)
    parts: list[Weight] = [random_packed(rng, (rng.randint(1, 150), in_features)) for _ in range(rng.randint(1, 3))]
    wide = [dequantize(part) for part in parts if not isinstance(part, torch.Tensor)]
    if rng.random() < 0.3:  # as in a checkpoint that keeps one of q, k and v in 16 bits
        parts.append(torch.randn(20, in_features).half())
        wide.append(torch.as_tensor(parts[-1]).float())
        parts[0], parts[-1], wide[0], wide[-1] = parts[-1], parts[0], wide[-1], wide[0]
    weight = torch.cat(wide).double()
    bias = torch.randn(len(weight)) if rng.random() < 0.5 else None
    for rows in (1, 2, 4, 33):
        x = torch.randn(rows, in_features)
        expected = x.double() @ weight.t()
        if bias is not None:
            expected += bias.double()
        found = linear(x, parts, bias)
        assert found.shape == expected.shape
        assert distance(found, expected) < 1e-6
        y = torch.randn(rows, len(weight))
        first = 0
        for part in parts:
            own, first = y[:, first : first + part.shape[0]], first + part.shape[0]
            expected = own.double() @ weight[first - part.shape[0] : first]
            assert distance(linear_backward(own, part), expected) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(12))
def test_unpacked_tiles_are_the_dequantized_weight_bit_for_bit(seed: int, method: str) -> None:
    rng = random.Random(seed)
    weight = random_packed(rng, (rng.randint(2, 40), rng.choice([1, 2, 63, 64, 65, 256, 333])))
    assert torch.equal(METHODS[method](weight), dequantize(weight))
    assert torch.equal(METHODS[method](weight.rows(1, 2)), dequantize(weight)[1:2])
    for rows, tile in unpacked_tiles(weight, torch.bfloat16, 4 * weight.shape[1] * rng.choice([1, 3, 64]), method):
        assert torch.equal(tile, dequantize(weight, torch.bfloat16)[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_in_16_bits_are_near(dtype: torch.dtype) -> None:
    weight = random_packed(random.Random(3), (70, 200))
    x = torch.randn(5, 200).to(dtype)
    expected = x.double() @ dequantize(weight, dtype).double().t()
    assert distance(linear(x, [weight]), expected) < 1e-2
    assert linear(x, [weight]).dtype == dtype


def test_identity_gives_the_weight() -> None:
    weight = random_packed(random.Random(1), (70, 90))
    assert torch.equal(linear(torch.eye(90), [weight]), dequantize(weight).t())
    assert torch.equal(linear_backward(torch.eye(70), weight), dequantize(weight))


@pytest.mark.parametrize("seed", range(8))
def test_a_packed_weight_lies_in_one_run_of_bytes(seed: int) -> None:
    rng = random.Random(seed)
    weight = random_packed(rng, (rng.randint(1, 40), rng.choice([1, 2, 63, 64, 65, 256, 333])))
    layout = PackedLayout.of(weight)
    raw = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.put(weight, raw)
    assert weight.nbytes == layout.nbytes
    assert torch.equal(dequantize(layout.view(raw)), dequantize(weight))
