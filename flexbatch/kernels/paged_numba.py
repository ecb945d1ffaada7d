"""Attention of decoding rows over a paged KV cache as one compiled kernel for a CPU.

A piece of work is one sequence, one head of keys and values, and one partition of the positions, as in FlashDecoding:
its keys are read once for all the queries of the group, with a running maximum from page to page (Milakov and
Gimelshein, 2018). Scores, weights and sums are fp32; a row's result depends on nothing but the row. Torch's own kernel,
called for one page at a time, takes 2 to 5 times as long (``benchmarks/cpu_kernels.py``).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from flexbatch.kernels.native import FREE, PIECE, THREAD, kind, launch
from flexbatch.kernels.numba_parts import (
    address_of,
    compiled,
    draw,
    exponential,
    float_of,
    get,
    inlined,
    load,
    load_int,
    load_long,
    put,
    store,
)
from flexbatch.kernels.paged import PAGES, ROW, SLOT, START, PagedQueries

_ALIGN = 64  # bytes of a cache line: between the scratch memory of two threads

# Columns of a launch's record.
(
    SEQUENCES, PARTITIONS, PARTITION, WINDOW, RECORDS, FIELDS, KV_HEADS, GROUP, PAGE, POOL, Q, Q_ROW, Q_HEAD,
    OUT, LOGS, PARTIAL, PARTIAL_LOGS, SCRATCH, SCRATCH_BYTES, SCALE, DIM,
) = range(FREE, FREE + 21)  # fmt: skip

_LANES, _LARGEST = 16, 256  # head dims that have a kernel of their own: multiples, up to the largest

_Float = np.float32


def attend_decoding(
    out: Tensor, logs: Tensor | None, queries: PagedQueries, layer: Tensor, q: Tensor, scale: float
) -> None:
    """Write the attention of ``queries``, one a sequence, to their rows of ``out`` [T, heads, D].

    q [T, heads, D], layer [pages, kv_heads, 2, P, D] of q's type. ``logs`` [T, heads] fp32 gets the logarithms of the
    sums. Scratch memory: for each thread (P + 2 D + 2) * 4 bytes a query of a group, and (D + 1) * 4 a head and slot
    where a sequence has several partitions.
    """
    _, heads, dim = q.shape
    _, kv_heads, _, page, _ = layer.shape
    group, threads = heads // kv_heads, torch.get_num_threads()
    q = q if q.stride(2) == 1 else q.contiguous()
    records = queries.records
    assert out.is_contiguous()
    assert layer.is_contiguous()
    assert records.is_contiguous()
    each = -(-4 * group * (page + 2 * dim + 2) // _ALIGN) * _ALIGN
    scratch = torch.empty(each * threads + _ALIGN, dtype=torch.uint8)
    several = queries.partitions > 1
    partial = torch.empty(queries.slots if several else 0, heads, dim)
    partial_logs = torch.empty(partial.shape[:2])
    numbers = [len(records), queries.partitions, queries.partition, queries.window or 0]
    numbers += [records.data_ptr(), records.shape[1], kv_heads, group, page, layer.data_ptr()]
    numbers += [q.data_ptr(), q.stride(0), q.stride(1), out.data_ptr(), 0 if logs is None else logs.data_ptr()]
    numbers += [partial.data_ptr(), partial_logs.data_ptr()]
    numbers += [-(-scratch.data_ptr() // _ALIGN) * _ALIGN, each, int(np.float32(scale).view(np.int32)), dim]
    attend, merge = _kernels(dim if dim % _LANES == 0 and dim <= _LARGEST else 0, kind(q))
    launch(attend, numbers)
    if several:
        launch(merge, numbers)


@functools.cache
def _kernels(known: int, kind: int) -> tuple[int, int]:
    """Where the kernels for heads of ``known`` numbers of a kind begin; 0: of any."""

    def attend(record: int) -> None:
        dim = known or load_long(record, DIM)
        scratch = load_long(record, SCRATCH) + draw(record, THREAD) * load_long(record, SCRATCH_BYTES)
        kv_heads, group, page = load_long(record, KV_HEADS), load_long(record, GROUP), load_long(record, PAGE)
        partitions, partition, window = (
            load_long(record, PARTITIONS),
            load_long(record, PARTITION),
            load_long(record, WINDOW),
        )
        scale = float_of(np.int32(load_long(record, SCALE)))
        scores = scratch
        queries = scores + 4 * group * page
        sums = queries + 4 * group * dim  # of values, by their weights
        highest = sums + 4 * group * dim
        weights = highest + 4 * group
        heads = kv_heads * group
        while True:
            piece = draw(record, PIECE)
            if piece >= load_long(record, SEQUENCES) * kv_heads * partitions:
                break
            part, rest = piece % partitions, piece // partitions
            head = rest % kv_heads
            sequence = load_long(record, RECORDS) + 4 * load_long(record, FIELDS) * (rest // kv_heads)
            stop = load_int(sequence, START) + 1
            lowest = max(0, stop - window) if window else 0
            slot = load_int(sequence, SLOT) + part
            several = lowest // partition < (stop - 1) // partition
            part += lowest // partition
            begin, end = max(lowest, part * partition), min(stop, (part + 1) * partition)
            if begin >= end:
                continue
            row = load_int(sequence, ROW)
            for i in range(group):
                put(highest, i, _Float(-1e30))
                put(weights, i, _Float(0))
                at = row * load_long(record, Q_ROW) + (head * group + i) * load_long(record, Q_HEAD)
                for d in range(dim):
                    put(queries, i * dim + d, load(kind, load_long(record, Q), at + d) * scale)
                    put(sums, i * dim + d, _Float(0))
            while begin < end:
                place = begin % page
                count = min(page - place, end - begin)
                number = load_int(sequence, PAGES + begin // page)
                keys = ((number * kv_heads + head) * 2 * page + place) * dim
                _score(kind, dim, load_long(record, POOL), keys, count, queries, group, scores, page)
                _weigh(dim, count, group, scores, page, highest, weights, sums)
                _sum(kind, dim, load_long(record, POOL), keys + page * dim, count, group, scores, page, sums)
                begin += count
            for i in range(group):
                total = get(weights, i)
                log = get(highest, i) + _Float(math.log(total))
                turned = _Float(1) / total
                if several:
                    at = slot * heads + head * group + i
                    put(load_long(record, PARTIAL_LOGS), at, log)
                    for d in range(dim):
                        put(load_long(record, PARTIAL), at * dim + d, get(sums, i * dim + d) * turned)
                else:
                    at = row * heads + head * group + i
                    if load_long(record, LOGS) != 0:
                        put(load_long(record, LOGS), at, log)
                    for d in range(dim):
                        store(kind, load_long(record, OUT), at * dim + d, get(sums, i * dim + d) * turned)

    def merge(record: int) -> None:
        dim = known or load_long(record, DIM)
        heads = load_long(record, KV_HEADS) * load_long(record, GROUP)
        partition, window = load_long(record, PARTITION), load_long(record, WINDOW)
        sums = load_long(record, SCRATCH) + draw(record, THREAD) * load_long(record, SCRATCH_BYTES)
        partial, logs = load_long(record, PARTIAL), load_long(record, PARTIAL_LOGS)
        while True:
            piece = draw(record, PIECE)
            if piece >= load_long(record, SEQUENCES) * heads:
                break
            head = piece % heads
            sequence = load_long(record, RECORDS) + 4 * load_long(record, FIELDS) * (piece // heads)
            stop = load_int(sequence, START) + 1
            lowest = max(0, stop - window) if window else 0
            parts = (stop - 1) // partition - lowest // partition + 1
            if parts == 1:
                continue
            first = load_int(sequence, SLOT) * heads + head
            highest = get(logs, first)
            for part in range(parts):
                highest = max(highest, get(logs, first + part * heads))
            total = _Float(0)
            for d in range(dim):
                put(sums, d, _Float(0))
            for part in range(parts):
                at = first + part * heads
                weight = exponential(get(logs, at) - highest)
                total += weight
                for d in range(dim):
                    put(sums, d, get(sums, d) + weight * get(partial, at * dim + d))
            at = load_int(sequence, ROW) * heads + head
            if load_long(record, LOGS) != 0:
                put(load_long(record, LOGS), at, highest + _Float(math.log(total)))
            for d in range(dim):
                store(kind, load_long(record, OUT), at * dim + d, get(sums, d) / total)

    return address_of(compiled(attend)), address_of(compiled(merge))


@inlined
def _score(
    kind: int, dim: int, pool: int, keys: int, count: int, queries: int, group: int, scores: int, page: int
) -> None:
    """Products of every query of the group and ``count`` keys: [group, page]. Four queries share a key's numbers."""
    for token in range(count):
        at = keys + token * dim
        i = 0
        while i < group:
            a, b, c, d = _Float(0), _Float(0), _Float(0), _Float(0)
            left = group - i
            if left >= 4:
                for n in range(dim):
                    number = load(kind, pool, at + n)
                    a += get(queries, i * dim + n) * number
                    b += get(queries, (i + 1) * dim + n) * number
                    c += get(queries, (i + 2) * dim + n) * number
                    d += get(queries, (i + 3) * dim + n) * number
                put(scores, (i + 3) * page + token, d)
            elif left == 3:
                for n in range(dim):
                    number = load(kind, pool, at + n)
                    a += get(queries, i * dim + n) * number
                    b += get(queries, (i + 1) * dim + n) * number
                    c += get(queries, (i + 2) * dim + n) * number
            elif left == 2:
                for n in range(dim):
                    number = load(kind, pool, at + n)
                    a += get(queries, i * dim + n) * number
                    b += get(queries, (i + 1) * dim + n) * number
            else:
                for n in range(dim):
                    a += get(queries, i * dim + n) * load(kind, pool, at + n)
            put(scores, i * page + token, a)
            if left > 1:
                put(scores, (i + 1) * page + token, b)
            if left > 2:
                put(scores, (i + 2) * page + token, c)
            i += 4


@inlined
def _weigh(dim: int, count: int, group: int, scores: int, page: int, highest: int, weights: int, sums: int) -> None:
    """Scores to weights, relative to the highest so far; what was summed before is scaled to it."""
    for i in range(group):
        before = get(highest, i)
        top = before
        for token in range(count):
            top = max(top, get(scores, i * page + token))
        total = _Float(0)
        for token in range(count):
            weight = exponential(get(scores, i * page + token) - top)
            put(scores, i * page + token, weight)
            total += weight
        if top > before:
            scaled = exponential(before - top)
            put(highest, i, top)
            total += get(weights, i) * scaled
            for d in range(dim):
                put(sums, i * dim + d, get(sums, i * dim + d) * scaled)
        else:
            total += get(weights, i)
        put(weights, i, total)


@inlined
def _sum(
    kind: int, dim: int, pool: int, values: int, count: int, group: int, scores: int, page: int, sums: int
) -> None:
    """Add ``count`` values to each query's sum by their weights, four at a time; two queries share their numbers."""
    token = 0
    while token < count:
        at = values + token * dim
        several = token + 4 <= count
        i = 0
        while i < group:
            weight, into = i * page + token, i * dim
            a = get(scores, weight)
            if several and i + 2 <= group:
                b, c, d = get(scores, weight + 1), get(scores, weight + 2), get(scores, weight + 3)
                weight += page
                e, f = get(scores, weight), get(scores, weight + 1)
                g, h = get(scores, weight + 2), get(scores, weight + 3)
                for n in range(dim):
                    p, q = load(kind, pool, at + n), load(kind, pool, at + dim + n)
                    r, s = load(kind, pool, at + 2 * dim + n), load(kind, pool, at + 3 * dim + n)
                    own, next_ = (a * p + b * q) + (c * r + d * s), (e * p + f * q) + (g * r + h * s)
                    put(sums, into + n, get(sums, into + n) + own)
                    put(sums, into + dim + n, get(sums, into + dim + n) + next_)
                i += 2
            elif several:
                b, c, d = get(scores, weight + 1), get(scores, weight + 2), get(scores, weight + 3)
                for n in range(dim):
                    first = a * load(kind, pool, at + n) + b * load(kind, pool, at + dim + n)
                    second = c * load(kind, pool, at + 2 * dim + n) + d * load(kind, pool, at + 3 * dim + n)
                    put(sums, into + n, get(sums, into + n) + (first + second))
                i += 1
            else:
                for n in range(dim):
                    put(sums, into + n, get(sums, into + n) + a * load(kind, pool, at + n))
                i += 1
        token += 4 if several else 1
