"""Every kernel against dense float64 products and the torch reference, on a GPU; run by ``scripts/gpu_test``."""

from __future__ import annotations

import random

import pytest
import torch

from flexbatch.compression.groups import dequantize
from flexbatch.kernels.attention import Span, attend, prepare
from flexbatch.kernels.kv4 import attend_packed, rows_of, unpack_rows
from flexbatch.kernels.linear import linear, linear_backward
from flexbatch.kernels.paged import attend_paged, store_paged
from flexbatch.policy.footprint import kv_area_bytes
from tests.kernels.packed_cases import distance, random_packed
from tests.kernels.paged_cases import Case, Shape, assert_near, build, dense, random_shape
from tests.kernels.test_kv4 import drawn, fill, on, own_of, table

GPU = torch.device("cuda")
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = {  # kv_heads, group, dim
    "llama-3-8b": (8, 4, 128),
    "qwen2-7b": (4, 7, 128),
    "qwen2-0.5b": (2, 7, 64),
    "opt-2.7b": (32, 1, 80),
    "gpt2": (12, 1, 64),
    "wide": (2, 2, 256),
}


def by_kernels(case: Case) -> torch.Tensor:
    """Through ``prepare`` and ``attend``, as the engine goes."""
    shape = case.shape
    batch = prepare(case.spans, shape.page_tokens, shape.window, case.q.dtype, GPU).to(GPU)
    assert batch.paged
    return attend(batch, case.pool, case.q, case.k, case.v, case.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 300])
def test_shapes_of_real_models(heads: str, dtype: torch.dtype, window: int | None) -> None:
    rng = random.Random(1)
    singles = (*((rng.randint(0, 3000), 1) for _ in range(20)), (511, 1), (512, 1), (9000, 1))
    chunks = ((0, 700), (1000, 65), (63, 2), (2047, 130), (5, 3))
    case = build(rng, Shape(*HEADS[heads], 64, window, singles + chunks), dtype, GPU)
    assert_near(by_kernels(case), dense(case))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng, dims=(8, 20, 32, 48, 96, 112, 192), sizes=(4, 16, 32, 48, 64, 128), longest=900)
    case = build(rng, shape, rng.choice(DTYPES), GPU)
    assert_near(by_kernels(case), dense(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_torch_reference_agrees(dtype: torch.dtype) -> None:
    shape = Shape(4, 2, 64, 64, None, ((900, 1), (0, 1), (70, 200), (0, 65)))
    case = build(random.Random(2), shape, dtype, GPU)
    exact = prepare(case.spans, 64, None, torch.float32, CPU).to(GPU)
    reference = attend(
        exact, case.pool.nan_to_num().float(), case.q.float(), case.k.float(), case.v.float(), case.scale
    )
    assert_near(by_kernels(case), reference.double())


def test_a_row_is_the_same_in_any_company_and_every_time() -> None:
    case = build(random.Random(3), Shape(8, 4, 128, 64, None, ((1500, 1), (7, 1), (600, 1))), torch.float16, GPU)
    together = by_kernels(case)
    for _ in range(5):
        assert torch.equal(by_kernels(case), together)
    for span in case.spans:
        batch = prepare([Span(0, 1, span.start, span.pages)], 64, None, torch.float16, GPU).to(GPU)
        row = slice(span.row, span.row + 1)
        assert torch.equal(attend_paged(batch.paged, case.pool, case.q[row], case.scale), together[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 128), (3, 20), (96, 128)])
def test_store(kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pool = torch.randn(40, kv_heads, 2, 16, dim, device=GPU).to(dtype)
    qkv = torch.randn(300, 3 * kv_heads, dim, device=GPU).to(dtype)
    k, v = qkv[:, kv_heads : 2 * kv_heads], qkv[:, 2 * kv_heads :]
    places = torch.randperm(40 * 16)[:300]
    pages, offsets = places // 16, places % 16
    expected = pool.cpu()
    expected[pages, :, 0, offsets] = k.cpu()
    expected[pages, :, 1, offsets] = v.cpu()
    store_paged(pool, pages.to(GPU), offsets.to(GPU), k, v)
    assert torch.equal(pool.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 256, 257, 1000])
def test_products_with_packed_weights(rows: int, dtype: torch.dtype) -> None:
    rng = random.Random(rows)
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    for in_features in (64, 515, 2048):
        parts = [random_packed(rng, (rng.randint(1, 700), in_features)).to(GPU) for _ in range(2)]
        weight = torch.cat([dequantize(part, dtype) for part in parts]).double()
        bias = torch.randn(len(weight), device=GPU).to(dtype)
        x, y = (torch.randn(rows, size, device=GPU).to(dtype) for size in (in_features, len(weight)))
        assert distance(linear(x, parts, bias), x.double() @ weight.t() + bias.double()) < bound
        own = slice(0, parts[0].shape[0])
        assert distance(linear_backward(y[:, own], parts[0]), y[:, own].double() @ weight[own]) < bound


def test_a_pool_of_more_than_2_to_the_31_numbers() -> None:
    pages, heads, size, dim = 2**31 // (8 * 2 * 64 * 128) + 50, 8, 64, 128  # 4.3 GiB
    pool = torch.empty(pages, heads, 2, size, dim, dtype=torch.float16, device=GPU)
    assert pool.numel() > 2**31
    generator = torch.Generator(GPU).manual_seed(0)
    q, k, v = (torch.randn(1, heads, dim, device=GPU, dtype=torch.float16, generator=generator) for _ in range(3))
    last = pages - 1
    store_paged(pool, torch.tensor([last], device=GPU), torch.tensor([0], device=GPU), k, v)
    assert torch.equal(pool[last, :, 0, 0], k[0])
    batch = prepare([Span(0, 1, 0, [last])], size, None, torch.float16, GPU).to(GPU)
    torch.testing.assert_close(attend_paged(batch.paged, pool, q, 1.0), v)


@pytest.mark.parametrize("heads", [name for name in HEADS if name != "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_pages(heads: str, dtype: torch.dtype) -> None:
    """Stored and attended to on the GPU, against the CPU's reference over the same pages."""
    torch.manual_seed(3)
    shape = Shape(*HEADS[heads], 64, None, ((1000, 1), (511, 1), (0, 1), (0, 300), (70, 65)))
    case = build(random.Random(3), shape, dtype, CPU)
    turns = table(random.Random(1), shape.dim)
    turns = None if turns is None else torch.cat([turns] * 3)
    basis = drawn(shape.kv_heads, shape.dim, turns)
    pools = []
    for device in (CPU, GPU):
        pool = torch.zeros(*case.pool.shape[:3], kv_area_bytes(64, shape.dim), dtype=torch.uint8, device=device)
        fill(pool, case, basis.to(device), None if turns is None else turns.to(device))
        pools.append(pool)
    numbers = [unpack_rows(rows_of(pool.cpu(), shape.dim).contiguous(), shape.dim) for pool in pools]
    assert float((numbers[0] - numbers[1]).norm() / numbers[0].norm()) < 2e-3
    batch = prepare(case.spans, 64, None, torch.float32, packed=True)
    same = pools[0].to(GPU)
    expected = attend_packed(batch, pools[0], case.q.float(), own_of(case), case.scale, basis, turns)
    batch = prepare(case.spans, 64, None, dtype, GPU, packed=True).to(GPU)
    there = None if turns is None else turns.to(GPU)
    found = attend_packed(batch, same, case.q.to(GPU), on(own_of(case), GPU), case.scale, basis.to(GPU), there)
    assert float((found.float().cpu() - expected).norm() / expected.norm()) < 2e-3
