"""Factors are checked on their way from a file to memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from flexbatch.checkpoint.tensors import DTYPES
from flexbatch.lora.adapter import Adapter, AdapterPart, Factor
from flexbatch.lora.load import FactorReader, is_finite
from flexbatch.lora.modules import Module


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


def test_announcing_a_file_says_nothing_of_what_is_wrong_with_it(tmp_path: Path) -> None:
    adapter = Adapter("gone", tmp_path / "gone.safetensors", 10, ())
    FactorReader.announce(adapter)


@pytest.mark.parametrize("types", [("F16",), ("BF16",), ("F32",), ("F16", "F32"), ("BF16", "F16", "F32")])
@pytest.mark.parametrize("gap", [0, 2, 3])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
def test_factors_come_to_lie_where_they_should(
    types: tuple[str, ...], gap: int, into: torch.dtype, tmp_path: Path
) -> None:
    """Of one type or several, at whole numbers of it or not."""
    rng, file = random.Random(1), tmp_path / "adapter.safetensors"
    module = Module("layers.0.q", 1, "q", 0, 40, 24, 0)
    raw, parts, expected = bytearray(rng.randbytes(100)), [], []
    for number in range(6):
        rank, factors = rng.randint(1, 9), []
        for shape in ((rank, 40), (24, rank)):
            kind = types[number % len(types)]
            numbers = torch.randn(shape).to(DTYPES[kind])
            held = numbers.contiguous().view(torch.uint8).numpy().tobytes()
            factors.append(Factor(kind, shape, len(raw), len(held)))
            raw += held + bytes(gap)
            expected.append(numbers.to(into))
        parts.append(AdapterPart(module, rank, 1.0, *factors))
    file.write_bytes(raw)
    found: list[torch.Tensor] = []

    def place(part: AdapterPart) -> tuple[torch.Tensor, torch.Tensor]:
        found.extend(torch.full((part.rank, size), torch.nan, dtype=into) for size in (40, 24))
        return found[-2], found[-1]

    reader = FactorReader()
    reader.read(Adapter("one", file, len(raw), tuple(parts)), place)
    for number, (target, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(target, wanted.t() if number % 2 else wanted)
