"""Paged ragged attention against a brute force that looks at one token at a time, in float64."""

from __future__ import annotations

import random

import pytest
import torch

from flexbatch.kernels import native
from flexbatch.kernels.attention import Span, attend, prepare


def brute_force(
    histories: list[tuple[torch.Tensor, torch.Tensor]],
    spans: list[Span],
    q: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """histories: k and v [L, KV, D] of each span's sequence from position 0."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for (keys, values), span in zip(histories, spans, strict=True):
        group = q.shape[1] // keys.shape[1]
        for i in range(span.count):
            position = span.start + i
            low = 0 if window is None else max(0, position + 1 - window)
            for head in range(q.shape[1]):
                k = keys[low : position + 1, head // group].double()
                v = values[low : position + 1, head // group].double()
                weights = torch.softmax(k @ q[span.row + i, head].double() * scale, 0)
                out[span.row + i, head] = weights @ v
    return out


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force(seed: int, window: int | None) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads, group, dim = rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), rng.choice([8, 20, 48])
    size = rng.choice([4, 16, 64])
    free = list(range(400))
    if rng.random() < 0.5:
        rng.shuffle(free)  # scattered pages: the gathering path
    pool = torch.randn(400, kv_heads, 2, size, dim)
    spans: list[Span] = []
    histories = []
    row = 0
    for _ in range(rng.randint(1, 9)):
        start = rng.choice([0, 0, rng.randint(1, 90)])
        count = rng.choice([1, 1, rng.randint(2, 70)])
        length = start + count
        pages = [free.pop(0) for _ in range(-(-length // size))]
        keys, values = torch.randn(length, kv_heads, dim), torch.randn(length, kv_heads, dim)
        for position in range(length):
            pool[pages[position // size], :, 0, position % size] = keys[position]
            pool[pages[position // size], :, 1, position % size] = values[position]
        spans.append(Span(row, count, start, pages))
        histories.append((keys, values))
        row += count
    q = torch.randn(row, kv_heads * group, dim)
    k = torch.cat([keys[span.start :] for (keys, _), span in zip(histories, spans, strict=True)])
    v = torch.cat([values[span.start :] for (_, values), span in zip(histories, spans, strict=True)])
    batch = prepare(spans, size, window, torch.float32)
    attended = attend(batch, pool, q, k, v, 0.3)
    torch.testing.assert_close(attended.double(), brute_force(histories, spans, q, 0.3, window), atol=2e-5, rtol=1e-4)


def test_pages_that_lie_together_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "usable", lambda _: False)
    together = prepare([Span(0, 1, 100, [3, 4]), Span(1, 1, 60, [5])], 64, None, torch.float32)
    apart = prepare([Span(0, 1, 600, list(range(100, 0, -10)))], 64, None, torch.float32)
    assert together.pages is not None
    assert together.pages.gather is None
    assert together.pages.runs == ((3, 0, 3),)
    assert apart.pages is not None
    assert apart.pages.gather is not None


@pytest.mark.usefixtures("kernels")
def test_pages_of_nobody_inside_the_range_do_not_matter() -> None:
    torch.manual_seed(0)
    pool = torch.randn(4, 2, 2, 8, 16)
    spans = [Span(0, 1, 9, [0, 1]), Span(1, 1, 3, [3])]
    q, k, v = torch.randn(2, 4, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    batch = prepare(spans, 8, None, torch.float32)
    before = attend(batch, pool, q, k, v, 1.0)
    pool[2] = 1e30
    assert torch.equal(before, attend(batch, pool, q, k, v, 1.0))


@pytest.mark.usefixtures("kernels")
def test_a_shared_page_serves_every_sequence() -> None:
    torch.manual_seed(0)
    pool = torch.randn(4, 1, 2, 8, 16)
    q, k = torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    both = attend(prepare([Span(0, 1, 7, [2]), Span(1, 1, 7, [2])], 8, None, torch.float32), pool, q, k, k, 1.0)
    alone = attend(prepare([Span(0, 1, 7, [2])], 8, None, torch.float32), pool, q[1:], k[1:], k[1:], 1.0)
    torch.testing.assert_close(both[1:], alone)
