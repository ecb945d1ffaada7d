"""Random ragged batches over a paged pool, and their attention by dense products in float64.

Shared by the tests in Triton's interpreter and those on a GPU; knows neither.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels.attention import Span


@dataclass(frozen=True)
class Shape:
    """What a batch looks like: heads, pages, window, and (start, count) of every sequence."""

    kv_heads: int
    group: int
    dim: int
    page_tokens: int
    window: int | None
    sequences: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    """A batch: q [T, heads, D], k and v [T, KV, D] of its own tokens, and all keys and values [L, KV, D] a sequence."""

    shape: Shape
    spans: tuple[Span, ...]
    pool: Tensor
    histories: tuple[tuple[Tensor, Tensor], ...]
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def random_shape(rng: random.Random, *, dims: tuple[int, ...], sizes: tuple[int, ...], longest: int) -> Shape:
    """A few sequences, some of one query, some with a history, some both."""
    sequences = []
    for _ in range(rng.randint(1, 5)):
        start = rng.choice([0, rng.randint(1, longest), rng.randint(1, longest)])
        sequences.append((start, rng.choice([1, 1, rng.randint(2, max(2, longest // 2))])))
    return Shape(
        kv_heads=rng.choice([1, 2, 3]),
        group=rng.choice([1, 2, 3, 4, 7]),
        dim=rng.choice(dims),
        page_tokens=rng.choice(sizes),
        window=rng.choice([None, None, 1, 5, longest // 2]),
        sequences=tuple(sequences),
    )


def build(rng: random.Random, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Fill a pool with scattered pages for ``shape``; every place that no token was stored in is NaN."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def draw(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.dim, generator=generator).to(device, dtype)

    size = shape.page_tokens
    free = list(range(sum(-(-(start + count) // size) for start, count in shape.sequences) + 3))
    rng.shuffle(free)
    pool = torch.full((len(free), shape.kv_heads, 2, size, shape.dim), torch.nan, dtype=dtype, device=device)
    spans, histories, row = [], [], 0
    for start, count in shape.sequences:
        length = start + count
        pages = [free.pop() for _ in range(-(-length // size))]
        keys, values = draw(length, shape.kv_heads), draw(length, shape.kv_heads)
        where = torch.tensor(pages, device=device).repeat_interleave(size)[:length]
        offsets = torch.arange(length, device=device) % size
        pool[where, :, 0, offsets] = keys
        pool[where, :, 1, offsets] = values
        spans.append(Span(row, count, start, pages))
        histories.append((keys, values))
        row += count
    own = [(keys[span.start :], values[span.start :]) for (keys, values), span in zip(histories, spans, strict=True)]
    return Case(
        shape=shape,
        spans=tuple(spans),
        pool=pool,
        histories=tuple(histories),
        q=draw(row, shape.kv_heads * shape.group),
        k=torch.cat([keys for keys, _ in own]),
        v=torch.cat([values for _, values in own]),
        scale=0.3 if shape.dim < 64 else shape.dim**-0.5,
    )


def dense(case: Case) -> Tensor:
    """The attention of ``case`` in float64, one sequence after the other, without pages."""
    out = torch.empty(case.q.shape, dtype=torch.float64, device=case.q.device)
    window = case.shape.window
    for (keys, values), span in zip(case.histories, case.spans, strict=True):
        rows = slice(span.row, span.row + span.count)
        k = keys.double().repeat_interleave(case.shape.group, dim=1)
        v = values.double().repeat_interleave(case.shape.group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", case.q[rows].double(), k) * case.scale
        queries_at = torch.arange(span.start, span.start + span.count, device=k.device).unsqueeze(1)
        keys_at = torch.arange(len(k), device=k.device)
        visible = keys_at <= queries_at
        if window is not None:
            visible &= keys_at > queries_at - window
        scores.masked_fill_(~visible, -torch.inf)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out


TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""How far a kernel may be from float64, relative and absolute: fp32 sums, one rounding of weights and of results."""


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Compare with what the dtype of ``actual`` allows; NaN is never near."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
