"""Attention of sequences that begin alike, the shared pages read once, against a brute force in float64."""

from __future__ import annotations

import random

import pytest
import torch

from flexbatch.kernels.attention import Span, attend, prepare
from flexbatch.kernels.cascade import common_pages
from tests.kernels.test_attention import brute_force

SIZE = 8


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("transposed", [False, True])
def test_sequences_that_begin_alike(seed: int, window: int | None, transposed: bool) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads, group, dim = rng.choice([1, 2, 3]), rng.choice([1, 3, 4]), rng.choice([8, 20, 64])
    free = list(range(300))
    rng.shuffle(free)
    pool = torch.randn(300, kv_heads, 2, SIZE, dim)
    stems = []
    for _ in range(rng.randint(1, 3)):
        pages = [free.pop() for _ in range(rng.randint(1, 6))]
        stems.append((pages, torch.randn(2, len(pages) * SIZE, kv_heads, dim)))
    spans: list[Span] = []
    histories: list[tuple[torch.Tensor, torch.Tensor]] = []
    row = 0
    for _ in range(rng.randint(2, 10)):
        stem, held = rng.choice(stems)
        shared = rng.randint(0, len(stem))
        start = shared * SIZE + rng.choice([0, 0, rng.randint(0, 30)])
        count = rng.choice([1, 1, rng.randint(2, 30)])
        own = torch.randn(2, start + count - shared * SIZE, kv_heads, dim)
        keys, values = torch.cat([held[:, : shared * SIZE], own], 1)
        pages = stem[:shared] + [free.pop() for _ in range(-(-(start + count) // SIZE) - shared)]
        for position in range(start + count):
            pool[pages[position // SIZE], :, 0, position % SIZE] = keys[position]
            pool[pages[position // SIZE], :, 1, position % SIZE] = values[position]
        spans.append(Span(row, count, start, pages, shared))
        histories.append((keys, values))
        row += count
    q = torch.randn(row, kv_heads * group, dim)
    k = torch.cat([keys[span.start :] for (keys, _), span in zip(histories, spans, strict=True)])
    v = torch.cat([values[span.start :] for (_, values), span in zip(histories, spans, strict=True)])
    if transposed:  # as products of few rows leave them
        q, k, v = (x.flatten(1).t().contiguous().t().view(x.shape) for x in (q, k, v))
        assert row == 1 or q.stride(-1) == row
    batch = prepare(spans, SIZE, window, torch.float32).to(torch.device("cpu"))
    assert bool(batch.contexts) == (
        window is None and any(common_pages([s.pages for s in spans], [s.shared for s in spans]))
    )
    expected = brute_force(histories, spans, q, 0.3, window)
    torch.testing.assert_close(attend(batch, pool, q, k, v, 0.3).double(), expected, atol=2e-5, rtol=1e-4)


def test_scores_that_are_far_apart_stay_finite() -> None:
    torch.manual_seed(0)
    pool = torch.randn(6, 1, 2, SIZE, 16)
    q, k = 40 * torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    pool[0, :, 0] *= 40
    spans = [Span(0, 1, SIZE + 3, [0, 1], 1), Span(1, 1, SIZE + 2, [0, 2], 1)]
    together = attend(prepare(spans, SIZE, None, torch.float32), pool, q, k, k, 1.0)
    for place, span in enumerate(spans):
        alone = prepare([Span(0, 1, span.start, span.pages)], SIZE, None, torch.float32)
        rows = slice(place, place + 1)
        torch.testing.assert_close(together[rows], attend(alone, pool, q[rows], k[rows], k[rows], 1.0))


def test_what_tables_begin_with_alike() -> None:
    tables = [[5, 6, 7, 1], [5, 6, 7, 2], [5, 6, 8, 3], [9, 4], [5, 6]]
    assert common_pages(tables, [3, 3, 2, 1, 0]) == [(2, [0, 1, 2])]
    assert common_pages(tables[:2], [3, 3]) == [(3, [0, 1])]
    assert common_pages(tables, [0, 0, 0, 2, 2]) == []
