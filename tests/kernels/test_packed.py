"""Products with packed weights against fp64 products with the dequantized ones."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from flexbatch.compression.groups import GROUPS, Packed, dequantize, groups_of, pack_codes
from flexbatch.kernels import packed as kernels
from flexbatch.kernels.packed import METHODS, MethodRates, packed_linear, packed_product


def random_packed(rng: random.Random, shape: tuple[int, int]) -> Packed:
    torch.manual_seed(rng.randint(0, 1 << 30))
    group = rng.choice(GROUPS)
    per_group = (shape[0], groups_of(shape[1], group))
    scale_type = rng.choice([torch.float16, torch.bfloat16])
    zeros = rng.random() < 0.5
    return Packed(
        pack_codes(torch.randint(0, 16, shape)),
        (torch.rand(per_group) * 0.02).to(scale_type),
        None if zeros else (torch.randn(per_group) * 0.1).to(scale_type),
        torch.randint(0, 17, per_group, dtype=torch.uint8) if zeros else None,
        group,
        shape,
    )


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(16))
def test_products_equal_those_of_the_dequantized_weight(
    seed: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    in_features = rng.choice([1, 31, 64, 127, 128, 320, 515, 1000])
    monkeypatch.setattr(kernels, "TILE_BYTES", 4 * in_features * rng.choice([1, 7, 64]))
    parts = [random_packed(rng, (rng.randint(1, 150), in_features)) for _ in range(rng.randint(1, 3))]
    x = torch.randn(rng.choice([1, 4, 33]), in_features)
    bias = torch.randn(sum(part.shape[0] for part in parts)) if rng.random() < 0.5 else None
    weight = torch.cat([dequantize(part) for part in parts])
    expected = x.double() @ weight.double().t()
    if bias is not None:
        expected += bias.double()
    found = packed_linear(x, parts, bias, method)
    assert found.shape == expected.shape
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(12))
def test_unpacked_tiles_are_the_dequantized_weight_bit_for_bit(seed: int, method: str) -> None:
    rng = random.Random(seed)
    weight = random_packed(rng, (rng.randint(2, 40), rng.choice([1, 2, 63, 64, 65, 256, 333])))
    assert torch.equal(METHODS[method](weight), dequantize(weight))
    assert torch.equal(METHODS[method](weight.rows(1, 2)), dequantize(weight)[1:2])


def test_identity_gives_the_weight() -> None:
    weight = random_packed(random.Random(1), (70, 90))
    out = torch.empty(70, 90)
    packed_product(torch.eye(90), weight, out)
    assert torch.equal(out, dequantize(weight))


def test_the_fastest_measured_method_is_chosen() -> None:
    rates = MethodRates({"fused": {1: 4.0, 16: 1.0}, "plain": {1: 1.0, 16: 2.0}})
    assert [rates.best(rows) for rows in (1, 4, 15, 16, 900)] == ["fused", "fused", "fused", "plain", "plain"]
    assert MethodRates({}).best(3) == "fused"
    assert MethodRates({"plain": {8: 1.0}}).best(3) == "plain"
