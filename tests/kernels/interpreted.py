"""The Triton kernels in Triton's interpreter, on the CPU. Run by ``test_paged_triton``, in a process of its own.

The interpreter has to be chosen before triton is imported: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter  # type: ignore[import-untyped]

from flexbatch.checkpoint.locate import locate
from flexbatch.kernels import paged, paged_triton
from flexbatch.kernels.attention import Span, attend, prepare
from flexbatch.kernels.paged import PagedQueries, attend_paged, index_queries, store_paged
from flexbatch.kernels.paged_triton import Tile
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.runtime.engine import Engine
from tests.kernels.paged_cases import Case, Shape, assert_near, build, dense, random_shape
from tests.oracle import assert_equal, generate_alone, ragged_rows, requests_of
from tests.tiny import tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(paged.BACKENDS, "cpu", "flexbatch.kernels.paged_triton")
    patch: Callable[..., None] = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        # Triton 3.6 makes loop bounds of arrays of one number by int(), which NumPy refuses since 2.4.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)


def index(case: Case, partition: int) -> list[PagedQueries]:
    """Singles and chunks, as ``prepare`` does, with partitions of a chosen length."""

    def of(spans: list[Span]) -> PagedQueries:
        return index_queries(
            [span.row for span in spans],
            [span.start for span in spans],
            [span.count for span in spans],
            [span.pages for span in spans],
            page_tokens=case.shape.page_tokens,
            window=case.shape.window,
            partition=partition,
        )

    groups = [[s for s in case.spans if s.count == 1], [s for s in case.spans if s.count > 1]]
    return [of(group) for group in groups if group]


@pytest.mark.parametrize("seed", range(10))
def test_ragged_batches(seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng, dims=(8, 20, 32, 48, 80), sizes=(4, 16, 48, 64), longest=90)
    case = build(rng, shape, rng.choice([torch.float32, torch.float16]), CPU)
    attended = attend_paged(index(case, rng.choice([64, 512])), case.pool, case.q, case.scale)
    assert_near(attended, dense(case))


@pytest.mark.parametrize("window", [None, 1, 40, 200])
@pytest.mark.parametrize(("group", "page_tokens"), [(1, 16), (3, 24)])
def test_long_rows_are_merged_of_partitions(group: int, page_tokens: int, window: int | None) -> None:
    shape = Shape(2, group, 20, page_tokens, window, ((0, 1), (31, 1), (32, 1), (299, 1), (130, 1)))
    case = build(random.Random(5), shape, torch.float32, CPU)
    (queries,) = index(case, 32)
    assert queries.partitions == {None: 10, 1: 1, 40: 3, 200: 7}[window]
    out = torch.full_like(case.q, torch.nan)
    paged_triton.attend(out, queries, case.pool, case.q, case.scale, Tile(16, 16, warps=4, stages=1))
    assert_near(out, dense(case))


def test_a_row_is_the_same_in_any_company() -> None:
    rng = random.Random(6)
    case = build(rng, Shape(1, 2, 16, 16, None, ((150, 1), (7, 1), (300, 1))), torch.float16, CPU)
    together = attend_paged(index(case, 64), case.pool, case.q, case.scale)
    for span in case.spans:
        alone = replace(case, spans=(replace(span, row=0),))
        row = slice(span.row, span.row + 1)
        assert torch.equal(attend_paged(index(alone, 64), case.pool, case.q[row], case.scale), together[row])


def test_projections_need_not_be_contiguous() -> None:
    case = build(random.Random(7), Shape(2, 2, 16, 16, None, ((0, 20), (30, 1))), torch.float32, CPU)
    fused = torch.cat([case.k, case.q], dim=1)
    attended = attend_paged(index(case, 64), case.pool, fused[:, case.k.shape[1] :], case.scale)
    assert_near(attended, dense(case))
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend_paged(index(case, 64), case.pool, transposed, case.scale), attended)


def test_a_batch_prepared_for_kernels_is_attended_by_them() -> None:
    case = build(random.Random(8), Shape(2, 2, 20, 16, 50, ((0, 1), (90, 1), (40, 30))), torch.float32, CPU)
    batch = prepare(case.spans, 16, 50, torch.float32, CPU).to(CPU)
    assert [queries.longest for queries in batch.paged] == [1, 30]
    assert_near(attend(batch, case.pool, case.q, case.k, case.v, case.scale), dense(case))


@pytest.mark.parametrize(("kv_heads", "dim", "dtype"), [(3, 20, torch.float32), (96, 16, torch.float16)])
def test_store(kv_heads: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pool = torch.randn(6, kv_heads, 2, 16, dim).to(dtype)
    qkv = torch.randn(5, 3 * kv_heads, dim).to(dtype)
    k, v = qkv[:, kv_heads : 2 * kv_heads], qkv[:, 2 * kv_heads :]
    pages, offsets = torch.tensor([5, 0, 3, 3, 1]), torch.tensor([0, 15, 7, 8, 2])
    expected = pool.clone()
    for token in range(5):
        expected[pages[token], :, 0, offsets[token]] = k[token]
        expected[pages[token], :, 1, offsets[token]] = v[token]
    stored, reference = pool.clone(), pool.clone()
    store_paged(stored, pages, offsets, k, v)
    assert torch.equal(stored, expected)
    monkeypatch.delitem(paged.BACKENDS, "cpu")
    store_paged(reference, pages, offsets, k, v)
    assert torch.equal(reference, expected)


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_the_engine_with_kernels_equals_transformers(family: str, tmp_path: Path) -> None:
    rng = random.Random(9)
    tiny_checkpoint(tmp_path, family, "plain", seed=9, rng=rng)
    folder = locate(str(tmp_path))
    rows = generate_alone(tmp_path, ragged_rows(rng, folder.shape.vocab_size, 3, longest=40, new=4))
    requests = requests_of(rows)
    with Engine(folder, None, EngineOptions(device="cpu"), Workload.of(requests)) as engine:
        assert_equal(list(engine.run(requests)), rows)
