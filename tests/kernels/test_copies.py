"""Matrices are copied as torch copies them, whole or turned, and a number that is not finite is found anywhere."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from flexbatch.kernels import copies_numba
from flexbatch.kernels.copies import copy_finite, is_finite

TYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [
    (1, 1, 1),
    (3, 4, 8),
    (2, 5, 7),
    (7, 8, 64),
    (2, 64, 65),
    (1, 66, 131),
    (2, 16, 576),
    (3, 72, 12),
    (4, 1, 9),
    (4, 9, 1),
    (0, 3, 3),
]

pytestmark = pytest.mark.usefixtures("kernels")


def pair(shape: tuple[int, int, int], dtype: torch.dtype, into: torch.dtype, turned: bool) -> tuple[Tensor, Tensor]:
    """A target in the middle of its memory, with a gap behind each matrix, and a source of ``dtype`` like that."""
    count, rows, columns = shape
    size = rows * columns
    source = torch.randn(count * (size + 3) + 5).to(dtype)[5:]
    target = torch.full((count * (size + 2) + 3,), 7, dtype=into)[3:]
    own = (1, rows) if turned else (columns, 1)
    return target.as_strided(shape, (size + 2, columns, 1)), source.as_strided(shape, (size + 3, *own))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_copies_equal_torchs(dtype: torch.dtype, turned: bool, alone: bool) -> None:
    torch.manual_seed(0)
    pairs = [pair(shape, dtype, dtype, turned) for shape in SHAPES]
    assert all(copies_numba.copies(*each) for each in pairs)
    pairs += [pair(shape, dtype, into, turned) for shape in SHAPES for into in TYPES]
    assert copy_finite([target for target, _ in pairs], [source for _, source in pairs], alone=alone)
    for target, source in pairs:
        expected = torch.full((target.untyped_storage().nbytes() // target.itemsize,), 7, dtype=target.dtype)
        expected.as_strided(target.shape, target.stride(), 3).copy_(source)
        assert torch.equal(torch.empty(0, dtype=target.dtype).set_(target.untyped_storage()), expected)


def test_other_strides_and_types() -> None:
    """A target that is turned itself, columns that lie apart, types that no kernel has."""
    source = torch.randn(3, 6, 10)
    for target in (
        torch.empty(3, 10, 6).transpose(1, 2),
        torch.empty(3, 6, 20)[:, :, ::2],
        torch.empty(3, 6, 10).double(),
    ):
        assert not copies_numba.copies(target, source)
        assert copy_finite([target], [source])
        assert torch.equal(target, source.to(target.dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("turned", [False, True])
def test_one_bad_number_is_found_anywhere(dtype: torch.dtype, turned: bool) -> None:
    rng = random.Random(0)
    for shape in [shape for shape in SHAPES if shape[0]]:
        targets, sources = zip(*(pair(each, dtype, dtype, turned) for each in (shape, (2, 4, 4))), strict=True)
        largest = torch.finfo(dtype).max
        sources[0][-1, -1, -1] = largest
        assert copy_finite(targets, sources)
        where = [(0, 0, 0), tuple(size - 1 for size in shape), tuple(rng.randrange(size) for size in shape)]
        for place in where:
            kept = sources[0][place].clone()
            for bad in (torch.nan, torch.inf, -torch.inf, -torch.nan):
                sources[0][place] = bad
                assert not copy_finite(targets, sources)
            sources[0][place] = kept
        assert copy_finite(targets, sources)


def test_numbers_that_become_too_large_are_found() -> None:
    source, target = torch.full((1, 2, 2), 1e5), torch.empty(1, 2, 2, dtype=torch.float16)
    assert not copy_finite([target], [source])


@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_is_finite(dtype: torch.dtype) -> None:
    assert copy_finite([], [])
    assert is_finite(torch.empty(0, dtype=dtype))
