"""Ragged rows of adapters of any ranks, their factors in flat memory or scattered over pages, and the dense answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexbatch.kernels.lora import FlatFactors, PagedFactors, RowGroups, group_rows

RANKS = (0, 1, 2, 3, 5, 8, 16, 17, 33, 64, 128)


@dataclass(frozen=True)
class Case:
    x: Tensor
    y: Tensor
    spans: list[tuple[int, int, int]]
    groups: RowGroups
    factors: list[tuple[Tensor, Tensor, float]]
    rng: random.Random

    def dense(self) -> Tensor:
        """y with every adapter's product added, in double precision."""
        out = self.y.double()
        for first, count, adapter in self.spans:
            a, b, scale = self.factors[adapter]
            out[first : first + count] += scale * (self.x[first : first + count].double() @ a.double().t()) @ b.double()
        return out

    @property
    def base_rows(self) -> list[int]:
        """Rows that no adapter has."""
        busy = {row for first, count, _ in self.spans for row in range(first, first + count)}
        return [row for row in range(self.x.shape[0]) if row not in busy]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        ranks = np.array([a.shape[0] for a, _, _ in self.factors], dtype=np.int64)
        return ranks, np.array([scale for _, _, scale in self.factors], dtype=np.float32)

    def flat(self) -> FlatFactors:
        """Factors in one memory, rows of one width together, in a random order of adapters."""
        into, out = self.x.shape[1], self.y.shape[1]
        ranks, scales = self.arrays()
        order = self.rng.sample(range(len(ranks)), len(ranks))
        starts = np.zeros(len(ranks), dtype=np.int64)
        total = 3
        for adapter in order:
            starts[adapter] = total
            total += int(ranks[adapter]) + self.rng.randint(0, 2)
        a, b = torch.full((total, into), 7.0), torch.full((total, out), 7.0)
        for (own_a, own_b, _), start in zip(self.factors, starts, strict=True):
            a[start : start + own_a.shape[0]] = own_a
            b[start : start + own_a.shape[0]] = own_b
        return FlatFactors((a,), (b,), np.zeros_like(ranks), ranks, scales, starts, starts)

    def paged(self, page: int) -> PagedFactors:
        """Factors end to end in pages of ``page`` numbers that lie anywhere in a pool."""
        ranks, scales = self.arrays()
        images = [
            torch.cat([torch.randn(self.rng.randint(0, 9)), a.flatten(), b.flatten()]) for a, b, _ in self.factors
        ]
        counts = [max(1, -(-image.numel() // page)) for image in images]
        ids = self.rng.sample(range(sum(counts) + 3), sum(counts))
        pool = torch.full((sum(counts) + 3, page), 9.0, dtype=self.x.dtype)
        tables = np.zeros((len(images), max(counts)), dtype=np.int32)
        a_starts, b_starts = (np.zeros(len(images), dtype=np.int64) for _ in range(2))
        for adapter, (image, count) in enumerate(zip(images, counts, strict=True)):
            own = [ids.pop() for _ in range(count)]
            if self.rng.random() < 0.3:
                own.sort()
            tables[adapter, :count] = own
            padded = torch.zeros(count * page)
            padded[: image.numel()] = image
            pool[own] = padded.view(count, page).to(self.x.dtype)
            a, b, _ = self.factors[adapter]
            b_starts[adapter] = image.numel() - b.numel()
            a_starts[adapter] = b_starts[adapter] - a.numel()
        return PagedFactors(pool, torch.from_numpy(tables), ranks, scales, a_starts, b_starts)


def build(
    rng: random.Random,
    into: int,
    out: int,
    *,
    rows: int = 60,
    dtype: torch.dtype = torch.float32,
    transposed: bool = False,
) -> Case:
    """Rows in runs of one to twenty, of twelve adapters or of none; y may lie column by column."""
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    factors = []
    for _ in range(12):
        rank = rng.choice(RANKS)
        a = torch.randn(rank, into, generator=generator).to(dtype) / into**0.5
        b = torch.randn(rank, out, generator=generator).to(dtype) / max(1, rank) ** 0.5
        factors.append((a, b, rng.choice([0.5, 1.0, 2.0, 1.7])))
    spans: list[tuple[int, int, int]] = []
    row = 0
    while row < rows:
        count = rng.choice([1, 1, 1, 2, 20])
        if rng.random() < 0.7:
            spans.append((row, count, rng.randrange(12)))
        row += count
    x = torch.randn(row, into, generator=generator).to(dtype)
    y = torch.randn(out, row, generator=generator).to(dtype).t() if transposed else torch.randn(row, out).to(dtype)
    return Case(x, y, spans, group_rows(spans), factors, rng)
