"""LoRA's products on the CPU against dense ones in double precision: any mix of adapters, ranks and rows."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flexbatch.kernels import lora_triton, native
from flexbatch.kernels.lora import FACTOR_TYPES, FlatFactors, FlatProduct, add_paged, add_paged_reference, group_rows
from tests.kernels.lora_cases import Case, build
from tests.kernels.test_paged_triton import TURING_SHARED, compiled

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_flat_and_paged(seed: int, transposed: bool) -> None:
    rng = random.Random(seed)
    case = build(rng, rng.choice([20, 80, 576]), rng.choice([12, 192, 131]), transposed=transposed)
    wanted = case.dense()
    results = [case.y.clone(memory_format=torch.preserve_format) for _ in range(2)]
    FlatProduct(case.groups, [case.flat()]).add([results[0]], case.x)
    add_paged(results[1], case.x, case.groups, case.paged(rng.choice([16, 100, 4096])))
    for result in results:
        assert torch.allclose(result.double(), wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(result[case.base_rows], case.y[case.base_rows])


@pytest.mark.usefixtures("kernels")
def test_a_part_of_the_columns() -> None:
    case = build(random.Random(1), 48, 30)
    whole = torch.randn(case.x.shape[0], 100)
    before = whole.clone()
    FlatProduct(case.groups, [case.flat()]).add([whole[:, 20:50]], case.x)
    assert torch.equal(whole[:, :20], before[:, :20])
    assert torch.equal(whole[:, 50:], before[:, 50:])
    added = whole[:, 20:50].double() - before[:, 20:50].double()
    assert torch.allclose(added, case.dense() - case.y.double(), atol=1e-4)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_modules_that_read_the_same_input(seed: int, adjacent: bool) -> None:
    """Three of different widths and ranks; their factors a stand one behind the other, or somewhere."""
    rng = random.Random(seed)
    into, widths = rng.choice([48, 576]), (96, 32, 64)
    cases = [build(random.Random(seed), into, width) for width in widths]  # the same rows of the same adapters
    cases = [replace(case, x=cases[0].x, factors=other_ranks(case, rng)) for case in cases]
    modules = [case.flat() for case in cases]
    modules = side_by_side(cases, modules) if adjacent else apart(modules)
    y = torch.randn(cases[0].x.shape[0], sum(widths))
    before = y.clone()
    outputs = list(y.split(widths, dim=1))
    FlatProduct(cases[0].groups, modules).add(outputs, cases[0].x)
    for case, output, old in zip(cases, outputs, before.split(widths, dim=1), strict=True):
        added = output.double() - old.double()
        assert torch.allclose(added, case.dense() - case.y.double(), atol=1e-4, rtol=1e-4)
    assert torch.equal(y[cases[0].base_rows], before[cases[0].base_rows])


def other_ranks(case: Case, rng: random.Random) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    ranks = [rng.randint(0, a.shape[0]) for a, _, _ in case.factors]
    return [(a[:rank], b[:rank], scale) for rank, (a, b, scale) in zip(ranks, case.factors, strict=True)]


def apart(modules: list[FlatFactors]) -> list[FlatFactors]:
    """The same factors in one memory, one module's after the other's."""
    starts = np.cumsum([0, *(len(factors.a[0]) for factors in modules[:-1])])
    memory = torch.cat([factors.a[0] for factors in modules])
    return [replace(own, a=(memory,), a_rows=own.a_rows + start) for own, start in zip(modules, starts, strict=True)]


def side_by_side(cases: list[Case], modules: list[FlatFactors]) -> list[FlatFactors]:
    """The same factors, those of all modules in one memory, an adapter's one behind the other."""
    own = [torch.cat([case.factors[adapter][0] for case in cases]) for adapter in range(12)]
    starts = np.cumsum([0, *(len(factors) for factors in own[:-1])])
    memory, made = torch.cat(own), []
    for factors in modules:
        made.append(replace(factors, a=(memory,), a_rows=starts.copy()))
        starts += factors.ranks
    return made


@pytest.mark.usefixtures("kernels")
def test_a_row_is_the_same_in_any_company() -> None:
    """Few rows of an adapter share a pass, but no sums."""
    case = build(random.Random(2), 96, 64)
    together = torch.zeros(case.x.shape[0], 64)
    FlatProduct(group_rows(case.spans, few=10**6), [case.flat()]).add([together], case.x)
    assert_rows_alone_are(together, case, case.flat())


@pytest.mark.parametrize("dtype", FACTOR_TYPES)
def test_a_row_among_many_and_alone(dtype: torch.dtype) -> None:
    """Compiled kernels widen narrow factors for many rows at once: then sums may be in another order, not in fp32."""
    case = build(random.Random(3), 576, 200)
    flat = case.flat()
    memories = []
    for memory in (flat.a[0], flat.b[0]):
        each = [memory.clone().view(own).view(-1, memory.shape[1]) for own in FACTOR_TYPES]
        each[0] = each[FACTOR_TYPES.index(dtype)]
        each[0][: len(memory)] = memory.to(dtype)
        memories.append([each[0]] * len(FACTOR_TYPES))
    types = np.full_like(flat.ranks, FACTOR_TYPES.index(dtype))
    narrow = replace(flat, a=memories[0], b=memories[1], types=types)
    together = torch.zeros(case.x.shape[0], 200)
    FlatProduct(case.groups, [narrow]).add([together], case.x)
    assert_rows_alone_are(together, case, narrow, atol=0.0 if dtype == torch.float32 else 3e-6)


def assert_rows_alone_are(together: torch.Tensor, case: Case, factors: FlatFactors, *, atol: float = 0.0) -> None:
    for first, count, adapter in case.spans:
        for row in {first, first + count - 1}:
            alone = torch.zeros(1, together.shape[1])
            FlatProduct(group_rows([(0, 1, adapter)], few=10**6), [factors]).add([alone], case.x[row : row + 1])
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=atol)


@pytest.mark.usefixtures("kernels")
def test_a_thousand_adapters_at_once() -> None:
    rng = random.Random(3)
    case = build(rng, 64, 64, rows=10)
    ranks = [rng.choice([1, 7, 8, 16]) for _ in range(1000)]
    factors = [(torch.randn(rank, 64), torch.randn(rank, 64), 1.0) for rank in ranks]
    spans = [(row, 1, row) for row in range(1000)]
    many = type(case)(torch.randn(1000, 64), torch.zeros(1000, 64), spans, group_rows(spans), factors, rng)
    result = many.y.clone()
    FlatProduct(many.groups, [many.flat()]).add([result], many.x)
    assert torch.allclose(result.double(), many.dense(), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("dtype", native.TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_factors_of_every_type_at_once(seed: int, dtype: torch.dtype) -> None:
    """An adapter's factors may be in any of the types, whatever those of others and of the rows are."""
    rng = random.Random(seed)
    case = build(rng, 80, 37, dtype=dtype)
    flat = case.flat()
    types = np.array([rng.randrange(len(FACTOR_TYPES)) for _ in case.factors])
    narrow = [
        (a.to(FACTOR_TYPES[own]), b.to(FACTOR_TYPES[own]), scale)
        for own, (a, b, scale) in zip(types, case.factors, strict=True)
    ]
    views = []
    for side, memory in enumerate((flat.a[0], flat.b[0])):
        raw = memory.float().contiguous()
        each = [
            raw.view(own) if own == torch.float32 else raw.view(own).view(-1, memory.shape[1]) for own in FACTOR_TYPES
        ]
        for adapter, own in enumerate(types):
            first, rank = int((flat.a_rows, flat.b_rows)[side][adapter]), len(narrow[adapter][0])
            start = first if own == 0 else 2 * first  # the same bytes, seen as twice as many rows
            each[own][start : start + rank] = narrow[adapter][side]
        views.append(each)
    rows = np.where(types == 0, flat.a_rows, 2 * flat.a_rows)
    mixed = replace(flat, a=views[0], b=views[1], types=types, a_rows=rows, b_rows=rows)
    y = case.y.clone()
    FlatProduct(case.groups, [mixed]).add([y], case.x)
    wanted = replace(case, factors=narrow).dense()
    exact = dtype == torch.float32
    assert torch.allclose(y.double(), wanted, atol=1e-4 if exact else 2e-2, rtol=1e-4 if exact else 1e-2)
    assert torch.equal(y[case.base_rows], case.y[case.base_rows])


@pytest.mark.usefixtures("kernels")
def test_no_rows_and_no_ranks() -> None:
    case = build(random.Random(4), 16, 16)
    y = case.y.clone()
    FlatProduct(group_rows([]), [case.flat()]).add([y], case.x)
    add_paged_reference(y, case.x, group_rows([]), case.paged(16))
    assert torch.equal(y, case.y)


def test_kernels_in_the_interpreter() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted_lora.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_kernels_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"inner": "*fp32", "x": "*fp16", "y": "*fp16", "pool": "*fp16", "scales": "*fp32"}
    types |= dict.fromkeys(("tables", "rows", "records"), "*i32")
    types |= dict.fromkeys(("x_stride", "table_stride", "y_row", "y_column"), "i32")
    shared = {"PAGE": 65536, "FIELDS": 7, "TILE": 32, "EXACT": "tf32", "RANKS": 16}
    for kernel, own in (
        (lora_triton._shrink_kernel, {"IN": 4096, "DEPTH": 64}),
        (lora_triton._expand_kernel, {"OUT": 1024, "WIDTH": 64}),
    ):
        wanted = {name: value for name, value in types.items() if name in kernel.arg_names}
        made = compiled(kernel, wanted, shared | own, num_warps=4)
        assert "mma.sync" in made.asm["ptx"]
        assert made.metadata.shared <= TURING_SHARED
