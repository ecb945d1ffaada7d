"""Paged attention and the store of keys and values as one kernel each, where a device has kernels for them.

Owns the index records that such kernels read and the choice of the kernels by a tensor's device; it knows no kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

BACKENDS: dict[str, str] = {"cuda": "flexbatch.kernels.paged_triton"}
"""Device type -> the module with its kernels, imported when first used (see ``PagedBackend``)."""

PARTITION = 512
"""Keys that one program of a decoding row reads. Fixed, so that a row's result does not depend on its company."""

ROW, START, COUNT, SLOT, PAGES = range(5)  # columns of a record


@dataclass(frozen=True, slots=True)
class PagedQueries:
    """Queries of S sequences over a paged pool.

    ``records`` int32 [S, 4 + M]: first row of the queries, position of the first one, how many they are, first slot,
    and the sequence's pages (filled with 0). ``longest`` is the most queries of a sequence. Where it is 1, the keys of
    a sequence are cut into partitions of ``partition`` positions (multiples of it from position 0), at most
    ``partitions`` of a sequence and ``slots`` in all. ``window``: how many recent positions, its own included, a
    query sees.
    """

    records: Tensor
    longest: int
    partition: int
    partitions: int
    slots: int
    window: int | None

    def to(self, device: torch.device) -> PagedQueries:
        """The same on ``device``; one copy, on its current stream."""
        return replace(self, records=self.records.to(device, non_blocking=True))


class PagedBackend(Protocol):
    """What a module named in ``BACKENDS`` offers."""

    def attend(self, out: Tensor, queries: PagedQueries, layer: Tensor, q: Tensor, scale: float) -> None:
        """Write the attention of ``queries`` to their rows of ``out``; see ``attend_paged``."""

    def store(self, layer: Tensor, pages: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """See ``store_paged``."""


def has_kernels(device: torch.device) -> bool:
    """Whether ``attend_paged`` runs on ``device``."""
    return device.type in BACKENDS


def index_queries(
    rows: Sequence[int],
    starts: Sequence[int],
    counts: Sequence[int],
    tables: Sequence[Sequence[int]],
    *,
    page_tokens: int,
    window: int | None,
    partition: int = PARTITION,
) -> PagedQueries:
    """Index sequences with queries in rows ``rows[i] ..``, at positions ``starts[i] ..``, over the pages ``tables[i]``.

    Sequences of one query belong in a call of their own: only together are their keys cut into partitions.
    """
    needed = [-(-(start + count) // page_tokens) for start, count in zip(starts, counts, strict=True)]
    records = np.zeros((len(rows), PAGES + max(needed)), dtype=np.int32)
    records[:, ROW], records[:, START], records[:, COUNT] = rows, starts, counts
    for record, table, number in zip(records, tables, needed, strict=True):
        record[PAGES : PAGES + number] = table[:number]
    stop = records[:, START] + 1
    lowest = np.zeros_like(stop) if window is None else np.maximum(stop - window, 0)
    parts = -(-stop // partition) - lowest // partition
    records[:, SLOT] = np.cumsum(parts) - parts
    return PagedQueries(
        torch.from_numpy(records), max(counts), partition, int(parts.max()), int(parts.sum(dtype=np.int64)), window
    )


def attend_paged(groups: Sequence[PagedQueries], layer: Tensor, q: Tensor, scale: float) -> Tensor:
    """Causal attention of all ``groups``, whose own keys and values are already in ``layer``.

    q [T, heads, D]; layer [pages, kv_heads, 2, P, D] of q's dtype -> [T, heads, D]; sums are fp32. What lies in pages
    beyond a sequence's last position may be anything. Scratch memory: (D + 2) * 4 bytes a head and slot, where the
    keys of a decoding row fill more than one partition.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernels = _backend(q.device.type)
    for queries in groups:
        kernels.attend(out, queries, layer, q, scale)
    return out


def key_rows(pages: Tensor, offsets: Tensor, kv_heads: int, page_tokens: int) -> Tensor:
    """Rows of T tokens' keys, int64 [T * kv_heads], in a layer seen as [pages * kv_heads * 2 * P, D].

    The values' rows are ``page_tokens`` further on. They are the same in every layer.
    """
    heads = torch.arange(kv_heads, device=pages.device)
    return ((pages.unsqueeze(1) * kv_heads + heads) * 2 * page_tokens + offsets.unsqueeze(1)).flatten()


def store_paged(
    layer: Tensor, pages: Tensor, offsets: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None
) -> None:
    """Write k and v [T, kv_heads, D] to their pages and offsets (int64 [T]) in ``layer`` [pages, kv_heads, 2, P, D].

    ``rows``: what ``key_rows`` gives for them, if the caller has it already.
    """
    if has_kernels(k.device):
        _backend(k.device.type).store(layer, pages, offsets, k, v)
        return
    _, kv_heads, _, size, dim = layer.shape
    flat = layer.view(-1, dim)
    keys = key_rows(pages, offsets, kv_heads, size) if rows is None else rows
    flat.index_copy_(0, keys, k.reshape(-1, dim))
    flat.index_copy_(0, keys + size, v.reshape(-1, dim))


@functools.cache
def _backend(device_type: str) -> PagedBackend:
    return cast(PagedBackend, importlib.import_module(BACKENDS[device_type]))
