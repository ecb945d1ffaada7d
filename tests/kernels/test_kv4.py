"""4-bit pages: their bytes against a decoder by hand, attention over them against dense products in float64."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexbatch.kernels import kv4
from flexbatch.kernels.attention import attend, prepare
from flexbatch.kernels.kv4 import (
    attend_packed,
    group_of,
    pack_rows,
    rotate,
    rotation,
    row_bytes,
    store_packed,
    unpack_rows,
)
from tests.kernels.paged_cases import Case, Shape, assert_near, build, dense, random_shape

CPU = torch.device("cpu")
DIMS = (8, 20, 48, 64, 80, 128)


def decoded(row: Tensor, dim: int) -> list[float]:
    """One packed row as its documentation says."""
    raw, group = bytes(row.tolist()), group_of(dim)
    numbers: list[float] = []
    for start in range(0, len(raw), group // 2 + 4):
        scale, minimum = struct.unpack_from("<ee", raw, start + group // 2)
        for byte in raw[start : start + group // 2]:
            numbers += [scale * (byte & 15) + minimum, scale * (byte >> 4) + minimum]
    return numbers


@pytest.mark.parametrize("dim", DIMS)
def test_rows_are_what_the_format_says(dim: int) -> None:
    torch.manual_seed(dim)
    x = torch.randn(3, 2, dim)
    rows = pack_rows(x)
    assert rows.shape == (3, 2, row_bytes(dim))
    numbers = unpack_rows(rows, dim)
    expected = torch.tensor([decoded(row, dim) for row in rows.view(6, -1)], dtype=torch.float64).float()
    assert torch.equal(numbers, expected.view(3, 2, dim))
    groups = x.view(-1, group_of(dim))
    steps = (groups.amax(1) - groups.amin(1)) / 15
    error = (numbers - x).view_as(groups).square().mean(1)
    assert bool((error.mean() < steps.square().mean() / 12 * 1.1).all())


def test_capacity() -> None:
    for dim in (64, 80, 96, 128, 256):
        assert 2 * dim / row_bytes(dim) >= 3.4


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_keeps_products_and_flattens_outliers(dim: int) -> None:
    matrix = rotation(dim).double()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(dim, dtype=torch.float64), atol=1e-6, rtol=0)
    q, k = torch.randn(5, dim), torch.randn(7, dim)
    torch.testing.assert_close(rotate(q) @ rotate(k).t(), q @ k.t(), atol=1e-4, rtol=1e-4)
    if dim % 16 == 0:
        k[:, 3] = 50.0
        assert float(rotate(k).abs().amax()) < 30


def packed(case: Case) -> tuple[Tensor, Case]:
    """The packed pool of a case, and the case with the numbers that are in it."""
    pages, heads, _, size, dim = case.pool.shape
    pool = torch.zeros(pages, heads, 2, size, row_bytes(dim), dtype=torch.uint8)
    histories = []
    for (keys, values), span in zip(case.histories, case.spans, strict=True):
        where = torch.tensor(span.pages).repeat_interleave(size)[: len(keys)]
        offsets = torch.arange(len(keys)) % size
        store_packed(pool, where, offsets, keys, values)
        read = unpack_rows(pool, dim)
        histories.append((read[where, :, 0, offsets] @ rotation(dim).t(), read[where, :, 1, offsets]))
    return pool, replace(case, histories=tuple(histories))


@pytest.mark.parametrize("seed", range(12))
def test_attention_equals_dense_products_over_what_is_stored(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(kv4, "_TILE_BYTES", rng.choice([1, 20_000, 4 << 20]))
    shape = random_shape(rng, dims=(8, 20, 48, 64), sizes=(4, 16, 48), longest=90)
    case = build(rng, shape, torch.float32, CPU)
    pool, stored = packed(case)
    batch = prepare(case.spans, shape.page_tokens, shape.window, torch.float32)
    assert_near(attend_packed(batch, pool, case.q, case.scale), dense(stored))


def test_attention_is_near_that_over_full_pages() -> None:
    shape = Shape(2, 3, 64, 16, None, ((200, 1), (0, 40), (90, 1), (30, 20)))
    case = build(random.Random(3), shape, torch.float32, CPU)
    batch = prepare(case.spans, 16, None, torch.float32)
    found = attend_packed(batch, packed(case)[0], case.q, case.scale)
    expected = attend(batch, case.pool.nan_to_num(), case.q, case.k, case.v, case.scale)
    assert float((found - expected).norm() / expected.norm()) < 0.12


def test_a_shift_common_to_all_keys_changes_the_rounding_only() -> None:
    shape = Shape(1, 2, 64, 16, None, ((100, 1),))
    case = build(random.Random(4), shape, torch.float32, CPU)
    ((keys, values),) = case.histories
    offset = torch.randn(1, 1, 64) * 5
    span = case.spans[0]
    where, offsets = torch.tensor(span.pages).repeat_interleave(16)[:101], torch.arange(101) % 16
    batch = prepare(case.spans, 16, None, torch.float32)
    pools = [torch.zeros(*case.pool.shape[:-1], row_bytes(64), dtype=torch.uint8) for _ in range(2)]
    store_packed(pools[0], where, offsets, keys + offset, values)
    store_packed(pools[1], where, offsets, keys + offset, values, shift=offset)
    expected = dense(case)
    errors = [float((attend_packed(batch, pool, case.q, case.scale) - expected).norm()) for pool in pools]
    assert errors[1] < 0.7 * errors[0]
