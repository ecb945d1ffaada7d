"""The kernels over packed KV in Triton's interpreter, on the CPU. Run by ``test_kv4_triton``, in a process of its own.

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
from torch import Tensor
from triton.runtime import interpreter  # type: ignore[import-untyped]

from flexbatch.checkpoint.locate import locate
from flexbatch.kernels import kv4, kv4_triton, paged
from flexbatch.kernels.attention import AttentionBatch, prepare
from flexbatch.kernels.kv4 import attend_packed, pack_rows, rows_of, unpack_rows
from flexbatch.kernels.kv4_basis import Basis
from flexbatch.options import EngineOptions
from flexbatch.policy.footprint import kv_area_bytes
from flexbatch.policy.workload import Workload
from flexbatch.requests import Result
from flexbatch.runtime.engine import Engine
from tests.kernels.paged_cases import Shape, build, random_shape
from tests.kernels.test_kv4 import drawn, fill, own_of, pool_of, table
from tests.oracle import generate_alone, ragged_rows, requests_of
from tests.tiny import tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    patch: Callable[..., None] = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        # Triton 3.6 makes loop bounds of arrays of one number by int(), which NumPy refuses since 2.4.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)


def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kv4.BACKENDS, "cpu", "flexbatch.kernels.kv4_triton")
    monkeypatch.setitem(paged.BACKENDS, "cpu", "flexbatch.kernels.paged_triton")


@pytest.mark.parametrize(("seed", "dim"), list(enumerate((8, 20, 48, 64, 80, 128, 192))))
def test_store_and_attention_equal_the_reference(seed: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float16, torch.float32])
    shape = random_shape(rng, dims=(dim,), sizes=(4, 16, 48, 56, 64), longest=30)
    case = build(rng, shape, dtype, CPU)
    pool = pool_of(case)
    batch = prepare(case.spans, shape.page_tokens, shape.window, torch.float32, packed=True)
    turns = table(rng, dim)
    basis = drawn(shape.kv_heads, dim, turns)
    pools, attended = [], []
    for kernels in (False, True):
        own = pool.clone()
        if kernels:
            kernels_on_the_cpu(monkeypatch)
            batch = prepare(case.spans, shape.page_tokens, shape.window, torch.float32, packed=True)
            assert batch.paged
        fill(own, case, basis, turns)
        pools.append(own)
        q = case.q if kernels else case.q.float()
        attended.append(attend_packed(batch, own, q, own_of(case), case.scale, basis, turns).float())
    for (keys, _), span in zip(case.histories, case.spans, strict=True):
        where = torch.tensor(span.pages).repeat_interleave(shape.page_tokens)[: len(keys)]
        offsets = torch.arange(len(keys)) % shape.page_tokens
        rows = [unpack_rows(rows_of(own, dim)[where, :, :, offsets].contiguous(), dim) for own in pools]
        assert float((rows[0] - rows[1]).norm() / rows[0].norm()) < 1e-3
        same = rows_of(pools[0], dim)[where, :, :, offsets] == rows_of(pools[1], dim)[where, :, :, offsets]
        assert float(same.double().mean()) > 0.999
    assert float((attended[0] - attended[1]).norm() / attended[0].norm()) < 1e-3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_store_of_numbers_that_are_none_or_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_on_the_cpu(monkeypatch)
    pool = torch.zeros(1, 1, 2, kv_area_bytes(8, 64), dtype=torch.uint8)
    v = torch.randn(8, 1, 64)
    v[0, 0, 3], v[1, 0, 4], v[2] = torch.nan, 1e6, 2.5
    basis = Basis.plain(1, 64)
    kv4_triton.store(pool, torch.zeros(8, dtype=torch.long), torch.arange(8), torch.randn(8, 1, 64), v, basis)
    found = unpack_rows(rows_of(pool, 64)[0, 0, 1].contiguous(), 64)
    assert not found[0].isfinite().any()
    assert torch.equal(found[2], torch.full((64,), 2.5))
    expected = unpack_rows(pack_rows(v, basis.value_feedback), 64)[1:, 0]
    torch.testing.assert_close(found[1:], expected, rtol=1e-3, atol=1e-3)
    assert float(found[1, 4]) == pytest.approx(65504, rel=0.01)


def test_long_rows_are_merged_of_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(1, 3, 64, 64, None, ((1100, 1), (30, 1)))
    case = build(random.Random(5), shape, torch.float32, CPU)
    pool = pool_of(case)
    basis = drawn(1, 64, None)
    fill(pool, case, basis, None)

    def attended(batch: AttentionBatch, q: Tensor) -> Tensor:
        return attend_packed(batch, pool.clone(), q, own_of(case), case.scale, basis, None)

    expected = attended(prepare(case.spans, 64, None, torch.float32, packed=True), case.q)
    kernels_on_the_cpu(monkeypatch)
    batch = prepare(case.spans, 64, None, torch.float32, packed=True)
    assert batch.paged[0].partitions == 3
    found = attended(batch, case.q)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    alone = prepare([replace(case.spans[1], row=0)], 64, None, torch.float32, packed=True)
    case = replace(case, spans=case.spans[1:], histories=case.histories[1:])
    torch.testing.assert_close(attended(alone, case.q[1:]), found[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_the_engine_gives_the_same_with_and_without_kernels(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(9)
    tiny_checkpoint(tmp_path, family, "plain", seed=9, rng=rng)
    folder = locate(str(tmp_path))
    rows = generate_alone(tmp_path, ragged_rows(rng, folder.shape.vocab_size, 3, longest=40, new=4))
    requests = requests_of(rows)

    def run() -> dict[str, Result]:
        with Engine(folder, None, EngineOptions(device="cpu", kv_bits=4), Workload.of(requests)) as engine:
            return {result.id: result for result in engine.run(requests)}

    without = run()
    kernels_on_the_cpu(monkeypatch)
    assert run() == without
