"""Factors on their way from a file to memory: of any shape and type, in pieces, and checked."""

from __future__ import annotations

import random

import pytest
import torch

from flexbatch.lora.load import _SERIAL, _copy, is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (64, 576), (_SERIAL, 1), (3, _SERIAL), (2, _SERIAL + 1), (3, 100_000)])
def test_every_number_arrives(shape: tuple[int, int], dtype: torch.dtype) -> None:
    source = torch.randn(shape).to(dtype)
    for given in (source, source.t().contiguous().t()):
        target = torch.full(shape, torch.nan)
        _copy(target, given)
        assert torch.equal(target, source.float())


def test_one_bad_number_is_found_anywhere() -> None:
    rng = random.Random(0)
    numbers = torch.randn(5 * _SERIAL + 7)
    assert is_finite(numbers)
    assert is_finite(numbers[:0])
    for place in (0, _SERIAL - 1, _SERIAL, len(numbers) - 1, rng.randrange(len(numbers))):
        for bad in (torch.nan, torch.inf, -torch.inf):
            wrong = numbers.clone()
            wrong[place] = bad
            assert not is_finite(wrong)
