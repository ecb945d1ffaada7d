"""Factors are checked on their way from a file to memory."""

from __future__ import annotations

import random

import pytest
import torch

from flexbatch.lora.load import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_bad_number_is_found_anywhere(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    numbers = torch.randn(100_000).to(dtype)
    assert is_finite(numbers)
    assert is_finite(numbers[:0])
    for place in (0, 1, len(numbers) - 1, rng.randrange(len(numbers))):
        for bad in (torch.nan, torch.inf, -torch.inf):
            wrong = numbers.clone()
            wrong[place] = bad
            assert not is_finite(wrong)
