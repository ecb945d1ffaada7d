"""Dequantization against the package ``gguf``: every supported type, every byte pattern, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from flexbatch.checkpoint.gguf_blocks import BLOCKS, TYPE_NAMES, dequantize, first_not_finite


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_are_those_of_the_gguf_package(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    block = BLOCKS[kind]
    quantized = gguf.GGMLQuantizationType[kind]
    for rows, width in ((1, 256), (3, 512), (37, 256), (5, 256 * 211)):
        raw = rng.integers(0, 256, (rows, width // block.weights * block.nbytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(raw, quantized).reshape(rows, width)
        found = dequantize(torch.from_numpy(raw.reshape(-1)), kind, (rows, width)).numpy()
        numbers = ~np.isnan(expected)
        assert np.array_equal(np.isnan(found), ~numbers)
        assert np.array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


def test_sizes_and_numbers_are_those_of_the_gguf_package() -> None:
    for number, name in TYPE_NAMES.items():
        assert gguf.GGMLQuantizationType(number).name == name
    for name, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (block.weights, block.nbytes)


def test_the_first_value_that_is_not_finite_is_found() -> None:
    values = torch.zeros(3, 2**18)
    assert first_not_finite(values) is None
    values[2, 5] = torch.inf
    values[2, 9] = torch.nan
    assert first_not_finite(values) == 2 * 2**18 + 5
