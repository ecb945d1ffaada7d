"""The compiled attention of decoding rows: types, head widths, groups, partitions, threads, against float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from flexbatch.kernels import native
from flexbatch.kernels.paged import PagedQueries, index_queries
from flexbatch.kernels.paged_numba import attend_decoding

SCALE = 0.3


class Case:
    """Sequences of any length over pages anywhere in a pool whose other numbers are not finite."""

    def __init__(
        self, seed: int, dtype: torch.dtype, dim: int, kv_heads: int, group: int, *, page: int = 16, most: int = 150
    ) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.page, self.kv_heads, self.group = page, kv_heads, group
        self.lengths = [rng.randint(1, most) for _ in range(rng.randint(1, 9))] + [1, page, page + 1]
        counts = [-(-length // page) for length in self.lengths]
        free = rng.sample(range(sum(counts) + 3), sum(counts))
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.pool = torch.full((sum(counts) + 3, kv_heads, 2, page, dim), torch.nan, dtype=dtype)
        self.keys = [torch.randn(length, 2, kv_heads, dim).to(dtype) for length in self.lengths]
        for table, own in zip(self.tables, self.keys, strict=True):
            for position in range(len(own)):
                self.pool[table[position // page], :, :, position % page] = own[position].transpose(0, 1)
        rows = rng.sample(range(len(self.lengths) + 2), len(self.lengths))  # not in order, and not all of them
        self.rows = rows
        self.q = torch.randn(len(rows) + 2, kv_heads * group, dim).to(dtype)

    def queries(self, window: int | None, partition: int, chosen: list[int] | None = None) -> PagedQueries:
        chosen = list(range(len(self.rows))) if chosen is None else chosen
        return index_queries(
            [self.rows[i] for i in chosen],
            [self.lengths[i] - 1 for i in chosen],
            [1] * len(chosen),
            [self.tables[i] for i in chosen],
            page_tokens=self.page,
            window=window,
            partition=partition,
        )

    def wanted(self, window: int | None) -> tuple[Tensor, Tensor]:
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        logs = torch.zeros(self.q.shape[:2], dtype=torch.float64)
        for row, own in zip(self.rows, self.keys, strict=True):
            seen = own[-window:] if window else own
            keys, values = seen.double().repeat_interleave(self.group, 2).unbind(1)
            scores = torch.einsum("hd,lhd->hl", self.q[row].double(), keys) * SCALE
            out[row] = torch.einsum("hl,lhd->hd", scores.softmax(1), values)
            logs[row] = scores.logsumexp(1)
        return out, logs

    def attended(self, queries: PagedQueries) -> tuple[Tensor, Tensor]:
        out, logs = torch.zeros_like(self.q), torch.zeros(self.q.shape[:2])
        attend_decoding(out, logs, queries, self.pool, self.q, SCALE)
        return out, logs


@pytest.mark.parametrize("partition", [512, 32])
@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize("dtype", native.TYPES)
@pytest.mark.parametrize(("dim", "kv_heads", "group"), [(64, 3, 3), (16, 1, 8), (20, 2, 1), (48, 1, 6), (7, 2, 2)])
def test_equals_float64(
    dim: int, kv_heads: int, group: int, dtype: torch.dtype, window: int | None, partition: int
) -> None:
    case = Case(dim + group, dtype, dim, kv_heads, group)
    out, logs = case.attended(case.queries(window, partition))
    wanted, wanted_logs = case.wanted(window)
    exact = dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted, atol=1e-5 if exact else 2e-2, rtol=1e-5 if exact else 1e-2)
    torch.testing.assert_close(logs.double(), wanted_logs, atol=1e-4, rtol=1e-5)


def test_a_row_is_the_same_alone_and_with_any_number_of_threads() -> None:
    case = Case(3, torch.bfloat16, 64, 2, 5, most=400)
    together, _ = case.attended(case.queries(None, 64))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for i, row in enumerate(case.rows):
                alone, _ = case.attended(case.queries(None, 64, [i]))
                assert torch.equal(alone[row], together[row])
    finally:
        torch.set_num_threads(threads)


def test_large_scores_and_equal_ones() -> None:
    """A running maximum: scores of thousands, of either sign, and keys that are all the same."""
    case = Case(5, torch.float32, 32, 1, 4, most=100)
    for factor in (3000.0, 0.0):
        keys = case.pool[:, :, 0].mul_(factor).nan_to_num_()
        assert keys.isfinite().all()
        for own in case.keys:
            own[:, 0] *= factor
        out, logs = case.attended(case.queries(None, 32))
        wanted, wanted_logs = case.wanted(None)
        torch.testing.assert_close(out.double(), wanted, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(logs.double(), wanted_logs, atol=1e-2, rtol=1e-5)


def test_queries_of_other_strides() -> None:
    """Parts of a wider product: heads behind one another, rows further apart; and numbers that do not lie together."""
    case = Case(6, torch.float32, 16, 2, 2)
    wanted, _ = case.attended(case.queries(None, 512))
    whole = torch.randn(case.q.shape[0], 9, 16)
    whole[:, 2:6] = case.q
    for q in (whole[:, 2:6], case.q.transpose(0, 2).contiguous().transpose(0, 2)):
        case.q = q
        out = torch.zeros(q.shape)
        attend_decoding(out, None, case.queries(None, 512), case.pool, q, SCALE)
        assert torch.equal(out, wanted)
