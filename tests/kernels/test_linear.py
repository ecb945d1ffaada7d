"""Products against float64: plain, packed and widened operands, few rows and many, with and without bias."""

from __future__ import annotations

import itertools

import pytest
import torch

from flexbatch.kernels.linear import linear, pack


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 16), (192, 64), (320, 176), (63, 16), (64, 20), (5, 3)])
def test_every_operand_gives_the_product(outputs: int, inputs: int) -> None:
    torch.manual_seed(outputs * inputs)
    for rows, biased in itertools.product((1, 2, 7, 33, 250), (False, True)):
        x = torch.randn(rows, inputs)
        weight = torch.randn(outputs, inputs)
        bias = torch.randn(outputs) if biased else None
        half = weight.half()
        cases = {
            "plain": (linear(x, [weight], bias), weight),
            "packed": (linear(x, [pack(weight)], bias), weight),
            "transposed": (linear(x, [weight.t().contiguous().t()], bias), weight),
            "widened": (linear(x, [half], bias), half),
            "in parts": (linear(x, [weight[:2], weight[2:]], bias), weight),
        }
        for name, (product, operand) in cases.items():
            expected = x.double() @ operand.double().t() + (0 if bias is None else bias.double())
            assert product.shape == expected.shape
            torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4, msg=f"{name}, {rows} rows")


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (320, 96), (128, 48), (63, 17)])
def test_in_bf16_too(outputs: int, inputs: int) -> None:
    """Operands and result have 8 bits; sums have more."""
    torch.manual_seed(outputs * inputs)
    for rows, biased in itertools.product((1, 3, 16, 33, 64, 250), (False, True)):
        x = torch.randn(rows, inputs).bfloat16()
        weight, narrow = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs, inputs).half()
        bias = torch.randn(outputs).bfloat16() if biased else None
        cases = {
            "plain": (linear(x, [weight], bias), weight),
            "packed": (linear(x, [pack(weight)], bias), weight),
            "converted": (linear(x, [narrow], bias), narrow.bfloat16()),
            "in parts": (linear(x, [weight[:2], narrow[2:]], bias), torch.cat([weight[:2], narrow[2:].bfloat16()])),
        }
        for name, (product, operand) in cases.items():
            expected = x.double() @ operand.double().t() + (0 if bias is None else bias.double())
            assert product.dtype == torch.bfloat16
            allowed = 2**-7 * (expected.abs() + inputs**0.5)
            assert bool(((product.double() - expected).abs() <= allowed).all()), f"{name}, {rows} rows"


def test_packing_takes_no_more_memory_or_is_not_done() -> None:
    assert pack(torch.zeros(128, 48)).is_mkldnn == torch.backends.mkldnn.is_available()
    half = torch.zeros(128, 64, dtype=torch.bfloat16)
    assert not pack(half).is_mkldnn or torch.ops.mkldnn._nbytes(pack(half)) == half.nbytes
    for unfit in (torch.zeros(100, 48), torch.zeros(128, 40), torch.zeros(128, 48, dtype=torch.bfloat16)):
        assert pack(unfit) is unfit
