"""LoRA's products for rows of many adapters as two compiled kernels for a CPU: shrink, then expand.

A task is one adapter, its rows, and one module. Its factors are read where they lie, once for all its rows while a
cache holds them; inner numbers are products of a row with each row of a, outputs sums of the rows of b that those
weigh. Tasks are cut where there are few of them: by ranks, then by columns. Sums are fp32 and in the same order
whatever a row's company.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexbatch.kernels.lora import FACTOR_TYPES, ByAdapter, FlatFactors
from flexbatch.kernels.native import FREE, PIECE, THREAD, kind, launch
from flexbatch.kernels.numba_parts import (
    address_of,
    compiled,
    draw,
    float_of,
    get,
    inlined,
    load,
    load_bfloat,
    load_float,
    load_half,
    load_long,
    put,
    recall,
    store,
    widens_halves,
)

Ints = NDArray[np.int64]

# Columns of a task, and of a launch's record.
A, B, TYPE, RANK, SCALE, FIRST, ROWS, INTO, OUT, INNER, Y, FIELDS = range(12)
TASKS, COUNT, CUTS, X, X_ROW, ORDER, INNERS, Y_ROW, Y_COLUMN, SCRATCH, SCRATCH_BYTES = range(FREE, FREE + 11)

_BLOCK = 512  # outputs that are summed at a time: what a core's first cache holds beside the rows of b
_RANKS = 4  # inner numbers that are found in one pass over a row
_PIECES = 8  # of work for each thread, at least

_SIZES = np.array([dtype.itemsize for dtype in FACTOR_TYPES])
_Float = np.float32


def reads(stored: torch.dtype) -> bool:
    """Whether factors may be of this type: a processor may have no instruction for numbers of fp16."""
    return stored != torch.float16 or widens_halves()


def add_rows(outputs: Sequence[Tensor], x: Tensor, rows: ByAdapter, modules: Sequence[FlatFactors]) -> None:
    """Add to ``rows`` of every output [T, out_i] what the adapters of module i make of those of x [T, in].

    Outputs are parts of one product of x's type, of any strides. Scratch memory: 4 bytes an inner number, and 2 KB a
    thread.
    """
    tasks = np.concatenate([_tasks(y, factors, rows) for y, factors in zip(outputs, modules, strict=True)])
    tasks = tasks[tasks[:, RANK] > 0]
    if not len(tasks):
        return
    inner = tasks[:, RANK] * tasks[:, ROWS]
    ends = np.cumsum(inner)
    tasks[:, INNER] = ends - inner
    inners = torch.empty(int(ends[-1]))
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, _BLOCK)
    cuts = -(-_PIECES * threads // len(tasks))
    x = x if x.stride(1) == 1 else x.contiguous()
    numbers = [
        tasks.ctypes.data,
        len(tasks),
        cuts,
        x.data_ptr(),
        x.stride(0),
        rows.order.ctypes.data,
        inners.data_ptr(),
    ]
    shrink, expand = _kernels(kind(x))
    launch(shrink, numbers)
    launch(expand, [*numbers, outputs[0].stride(0), outputs[0].stride(1), scratch.data_ptr(), 4 * _BLOCK])


def _tasks(y: Tensor, factors: FlatFactors, rows: ByAdapter) -> Ints:
    adapters = rows.adapters
    tasks = np.empty((len(adapters), FIELDS), dtype=np.int64)
    into, out = factors.a[0].shape[1], factors.b[0].shape[1]
    types = factors.types[adapters]
    tasks[:, TYPE], sizes = types, _SIZES[types]
    tasks[:, A] = factors.a[0].data_ptr() + sizes * into * factors.a_rows[adapters]
    tasks[:, B] = factors.b[0].data_ptr() + sizes * out * factors.b_rows[adapters]
    tasks[:, RANK] = factors.ranks[adapters]
    tasks[:, SCALE] = factors.scales[adapters].view(np.int32)
    tasks[:, FIRST], tasks[:, ROWS] = rows.firsts, rows.counts
    tasks[:, INTO], tasks[:, OUT], tasks[:, Y] = into, out, y.data_ptr()
    return tasks


@functools.cache
def _kernels(kind: int) -> tuple[int, int]:
    """Where the kernels for outputs of a kind begin."""

    def shrink(record: int) -> None:
        cuts = load_long(record, CUTS)
        while True:
            piece = draw(record, PIECE)
            if piece >= load_long(record, COUNT) * cuts:
                break
            task = load_long(record, TASKS) + 8 * FIELDS * (piece // cuts)
            cut, rank = piece % cuts, load_long(task, RANK)
            begin, end = _RANKS * (rank * cut // cuts // _RANKS), _RANKS * (rank * (cut + 1) // cuts // _RANKS)
            end = rank if cut == cuts - 1 else end
            type_ = load_long(task, TYPE)
            if type_ == 0:
                _shrink(load_float, kind, record, task, begin, end)
            elif type_ == 1:
                _shrink(load_bfloat, kind, record, task, begin, end)
            else:
                _shrink(load_half, kind, record, task, begin, end)

    def expand(record: int) -> None:
        cuts, inners = load_long(record, CUTS), load_long(record, INNERS)
        sums = load_long(record, SCRATCH) + draw(record, THREAD) * load_long(record, SCRATCH_BYTES)
        while True:
            piece = draw(record, PIECE)
            if piece >= load_long(record, COUNT) * cuts:
                break
            task = load_long(record, TASKS) + 8 * FIELDS * (piece // cuts)
            cut, out, rank = piece % cuts, load_long(task, OUT), load_long(task, RANK)
            stop = out * (cut + 1) // cuts
            for column in range(out * cut // cuts, stop, _BLOCK):
                count = min(_BLOCK, stop - column)
                for row in range(load_long(task, ROWS)):
                    for n in range(count):
                        put(sums, n, _Float(0))
                    b, type_, inner = load_long(task, B), load_long(task, TYPE), load_long(task, INNER) + row * rank
                    if type_ == 0:
                        _sum(load_float, b, column, out, inners, inner, rank, sums, count)
                    elif type_ == 1:
                        _sum(load_bfloat, b, column, out, inners, inner, rank, sums, count)
                    else:
                        _sum(load_half, b, column, out, inners, inner, rank, sums, count)
                    y = load_long(record, ORDER) + 8 * (load_long(task, FIRST) + row)
                    at = load_long(y, 0) * load_long(record, Y_ROW) + column * load_long(record, Y_COLUMN)
                    if load_long(record, Y_COLUMN) == 1:
                        for n in range(count):
                            changed = recall(kind, load_long(task, Y), at + n) + get(sums, n)
                            store(kind, load_long(task, Y), at + n, changed)
                    else:
                        for n in range(count):
                            place = at + n * load_long(record, Y_COLUMN)
                            changed = recall(kind, load_long(task, Y), place) + get(sums, n)
                            store(kind, load_long(task, Y), place, changed)

    return address_of(compiled(shrink)), address_of(compiled(expand))


@inlined
def _shrink(number: Any, kind: int, record: int, task: int, begin: int, end: int) -> None:
    """Inner numbers ``begin`` to ``end`` of every row of a task."""
    rows, rank, into = load_long(task, ROWS), load_long(task, RANK), load_long(task, INTO)
    a, x = load_long(task, A), load_long(record, X)
    order = load_long(record, ORDER) + 8 * load_long(task, FIRST)
    inners = load_long(record, INNERS) + 4 * load_long(task, INNER)
    scale = float_of(np.int32(load_long(task, SCALE)))
    for inner in range(begin, end, _RANKS):
        first = inner * into
        for row in range(rows):
            at, result = load_long(order, row) * load_long(record, X_ROW), row * rank + inner
            if inner + _RANKS <= end:
                c, d, e, f = _Float(0), _Float(0), _Float(0), _Float(0)
                for n in range(into):
                    own = load(kind, x, at + n)
                    c += number(a, first + n) * own
                    d += number(a, first + into + n) * own
                    e += number(a, first + 2 * into + n) * own
                    f += number(a, first + 3 * into + n) * own
                put(inners, result, scale * c)
                put(inners, result + 1, scale * d)
                put(inners, result + 2, scale * e)
                put(inners, result + 3, scale * f)
            else:
                for left in range(end - inner):
                    c = _Float(0)
                    for n in range(into):
                        c += number(a, first + left * into + n) * load(kind, x, at + n)
                    put(inners, result + left, scale * c)


@inlined
def _sum(number: Any, b: int, column: int, out: int, inners: int, inner: int, rank: int, sums: int, count: int) -> None:
    """Add rows of b, by their inner numbers, to ``count`` sums: four rows at a time."""
    place = 0
    while place + 4 <= rank:
        at = place * out + column
        e, f = get(inners, inner + place), get(inners, inner + place + 1)
        g, h = get(inners, inner + place + 2), get(inners, inner + place + 3)
        for n in range(count):
            first = e * number(b, at + n) + f * number(b, at + out + n)
            second = g * number(b, at + 2 * out + n) + h * number(b, at + 3 * out + n)
            put(sums, n, get(sums, n) + (first + second))
        place += 4
    while place < rank:
        at, e = place * out + column, get(inners, inner + place)
        for n in range(count):
            put(sums, n, get(sums, n) + e * number(b, at + n))
        place += 1
