"""LoRA's products for rows of many adapters as two compiled kernels for a CPU: shrink, then expand.

A task is one adapter, its rows, and one module. Its factors are read where they lie, once for all its rows while a
cache holds them; inner numbers are products of a row with each row of a, outputs sums of the rows of b that those
weigh. Tasks are cut where there are few of them: by ranks, then by columns. Sums are fp32; their order depends on
whether an adapter has many rows only where its factors are narrower.
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
    get_copy,
    inlined,
    load,
    load_bfloat,
    load_float,
    load_half,
    load_long,
    put,
    put_copy,
    recall,
    store,
    widens_halves,
)

Ints = NDArray[np.int64]

# Columns of a task, and of a launch's record.
A, B, TYPE, RANK, SCALE, FIRST, ROWS, INTO, OUT, INNER, Y, FIELDS = range(12)
TASKS, COUNT, CUTS, X, X_ROW, ORDER, INNERS, Y_ROW, Y_COLUMN, COPY, COPY_BYTES, SUMS = range(FREE, FREE + 12)

_BLOCK = 512  # outputs that are summed at a time: what a core's first cache holds beside the rows of b
_REUSED = 4  # rows of one adapter from which on rows of its narrow a are widened once for all of them
_RANKS = 4  # inner numbers that are found in one pass over a row
_PIECES = 8  # of work for each thread, at least

_SIZES = np.array([dtype.itemsize for dtype in FACTOR_TYPES])
_Float = np.float32


def reads(stored: torch.dtype) -> bool:
    """Whether factors may be of this type: a processor may have no instruction for numbers of fp16."""
    return stored != torch.float16 or widens_halves()


class Tasks:
    """The work that ``rows`` and the modules of one product make; of all modules in one launch."""

    def __init__(self, rows: ByAdapter, modules: Sequence[FlatFactors]) -> None:
        made = [_tasks(factors, rows) for factors in modules]
        self._order = rows.order
        self._into = modules[0].a[0].shape[1]
        self._tasks = np.concatenate(made)
        self._stops = np.cumsum([len(own) for own in made]).tolist()
        inner = self._tasks[:, RANK] * self._tasks[:, ROWS]
        ends = np.cumsum(inner)
        self._tasks[:, INNER] = ends - inner
        self._inners = int(ends[-1]) if len(ends) else 0

    def add(self, outputs: Sequence[Tensor], x: Tensor) -> None:
        """Add to the rows of every output [T, out_i] what the adapters of module i make of those of x [T, in].

        Outputs are parts of one product of x's type, of any strides. Scratch memory: 4 bytes an inner number, and for
        each thread 4 KB and four rows of a in fp32.
        """
        tasks, count = self._tasks, len(self._tasks)
        if not count:
            return
        for y, start, stop in zip(outputs, (0, *self._stops), self._stops, strict=False):
            tasks[start:stop, Y] = y.data_ptr()
        threads = torch.get_num_threads()
        inners, sums = torch.empty(self._inners), torch.empty(threads, 2 * _BLOCK)
        copied = torch.empty(threads, _RANKS * self._into)
        x = x if x.stride(1) == 1 else x.contiguous()
        numbers = [tasks.ctypes.data, count, -(-_PIECES * threads // count), x.data_ptr(), x.stride(0)]
        numbers += [self._order.ctypes.data, inners.data_ptr(), outputs[0].stride(0), outputs[0].stride(1)]
        numbers += [copied.data_ptr(), 4 * copied.shape[1], sums.data_ptr()]
        shrink, expand = _kernels(kind(x))
        launch(shrink, numbers)
        launch(expand, numbers)


def _tasks(factors: FlatFactors, rows: ByAdapter) -> Ints:
    """A task for every adapter that changes the module."""
    having = factors.ranks[rows.adapters] > 0
    adapters = rows.adapters[having]
    tasks = np.empty((len(adapters), FIELDS), dtype=np.int64)
    into, out = factors.a[0].shape[1], factors.b[0].shape[1]
    types = factors.types[adapters]
    tasks[:, TYPE], sizes = types, _SIZES[types]
    tasks[:, A] = factors.a[0].data_ptr() + sizes * into * factors.a_rows[adapters]
    tasks[:, B] = factors.b[0].data_ptr() + sizes * out * factors.b_rows[adapters]
    tasks[:, RANK] = factors.ranks[adapters]
    tasks[:, SCALE] = factors.scales[adapters].view(np.int32)
    tasks[:, FIRST], tasks[:, ROWS] = rows.firsts[having], rows.counts[having]
    tasks[:, INTO], tasks[:, OUT] = into, out
    return tasks


@functools.cache
def _kernels(kind: int) -> tuple[int, int]:
    """Where the kernels for outputs of a kind begin."""

    def shrink(record: int) -> None:
        cuts = load_long(record, CUTS)
        copy = load_long(record, COPY) + draw(record, THREAD) * load_long(record, COPY_BYTES)
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
                _shrink(load_float, False, kind, record, task, begin, end, copy)
            elif type_ == 1:
                _shrink(load_bfloat, True, kind, record, task, begin, end, copy)
            else:
                _shrink(load_half, True, kind, record, task, begin, end, copy)

    def expand(record: int) -> None:
        cuts, sums = load_long(record, CUTS), load_long(record, SUMS) + draw(record, THREAD) * 8 * _BLOCK
        while True:
            piece = draw(record, PIECE)
            if piece >= load_long(record, COUNT) * cuts:
                break
            task = load_long(record, TASKS) + 8 * FIELDS * (piece // cuts)
            cut, out, type_ = piece % cuts, load_long(task, OUT), load_long(task, TYPE)
            begin, end = out * cut // cuts, out * (cut + 1) // cuts
            if type_ == 0:
                _expand(load_float, kind, record, task, begin, end, sums)
            elif type_ == 1:
                _expand(load_bfloat, kind, record, task, begin, end, sums)
            else:
                _expand(load_half, kind, record, task, begin, end, sums)

    return address_of(compiled(shrink)), address_of(compiled(expand))


@inlined
def _shrink(number: Any, narrow: bool, kind: int, record: int, task: int, begin: int, end: int, copy: int) -> None:
    """Inner numbers ``begin`` to ``end`` of every row of a task."""
    rows, rank, into = load_long(task, ROWS), load_long(task, RANK), load_long(task, INTO)
    a, x = load_long(task, A), load_long(record, X)
    order = load_long(record, ORDER) + 8 * load_long(task, FIRST)
    inners = load_long(record, INNERS) + 4 * load_long(task, INNER)
    scale = float_of(np.int32(load_long(task, SCALE)))
    for inner in range(begin, end, _RANKS):
        first = inner * into
        whole = inner + _RANKS <= end
        copies = narrow and whole and rows >= _REUSED
        if copies:
            for n in range(_RANKS * into):
                put_copy(copy, n, number(a, first + n))
        row = 0
        while row < rows:
            at, result = load_long(order, row) * load_long(record, X_ROW), row * rank + inner
            if copies and row + 2 <= rows:
                next_ = load_long(order, row + 1) * load_long(record, X_ROW)
                result = inners + 4 * result
                _eight_products(copy, kind, x, at, next_, into, result, result + 4 * rank, scale)
                row += 1
            elif copies:
                _four_products(get_copy, copy, 0, kind, x, at, into, inners, result, scale)
            elif whole:
                _four_products(number, a, first, kind, x, at, into, inners, result, scale)
            else:
                for left in range(end - inner):
                    total = _Float(0)
                    for n in range(into):
                        total += number(a, first + left * into + n) * load(kind, x, at + n)
                    put(inners, result + left, scale * total)
            row += 1


@inlined
def _four_products(
    number: Any, a: int, first: int, kind: int, x: int, at: int, into: int, inners: int, result: int, scale: np.float32
) -> None:
    """The products of a row and four of a, which share its numbers."""
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


@inlined
def _eight_products(
    copy: int, kind: int, x: int, at: int, next_: int, into: int, result: int, other: int, scale: np.float32
) -> None:
    """The same of two rows and four copied ones of a; results go to two addresses."""
    c, d, e, f = _Float(0), _Float(0), _Float(0), _Float(0)
    g, h, i, j = _Float(0), _Float(0), _Float(0), _Float(0)
    for n in range(into):
        p, q = get_copy(copy, n), get_copy(copy, into + n)
        r, s = get_copy(copy, 2 * into + n), get_copy(copy, 3 * into + n)
        one, two = load(kind, x, at + n), load(kind, x, next_ + n)
        c += p * one
        d += q * one
        e += r * one
        f += s * one
        g += p * two
        h += q * two
        i += r * two
        j += s * two
    put(result, 0, scale * c)
    put(result, 1, scale * d)
    put(result, 2, scale * e)
    put(result, 3, scale * f)
    put(other, 0, scale * g)
    put(other, 1, scale * h)
    put(other, 2, scale * i)
    put(other, 3, scale * j)


@inlined
def _expand(number: Any, kind: int, record: int, task: int, begin: int, end: int, sums: int) -> None:
    """Outputs ``begin`` to ``end`` of every row of a task, some at a time."""
    rows, rank, out, b = load_long(task, ROWS), load_long(task, RANK), load_long(task, OUT), load_long(task, B)
    order = load_long(record, ORDER) + 8 * load_long(task, FIRST)
    inners, y = load_long(record, INNERS) + 4 * load_long(task, INNER), load_long(task, Y)
    step = load_long(record, Y_COLUMN)
    for column in range(begin, end, _BLOCK):
        count = min(_BLOCK, end - column)
        row = 0
        while row < rows:
            several = 2 if row + 2 <= rows else 1
            for n in range(several * count):
                put(sums, n, _Float(0))
            if several == 2:
                _sum_two(number, b, column, out, inners, row * rank, rank, sums, count)
            else:
                _sum(number, b, column, out, inners, row * rank, rank, sums, count)
            for own in range(several):
                at = load_long(order, row + own) * load_long(record, Y_ROW) + column * step
                if step == 1:
                    for n in range(count):
                        store(kind, y, at + n, recall(kind, y, at + n) + get(sums, own * count + n))
                else:
                    for n in range(count):
                        place = at + n * step
                        store(kind, y, place, recall(kind, y, place) + get(sums, own * count + n))
            row += several


@inlined
def _sum(
    number: Any, b: int, first: int, width: int, inners: int, inner: int, rank: int, sums: int, count: int
) -> None:
    """Add rows of b, ``width`` apart, by their inner numbers, to ``count`` sums: four rows at a time."""
    place = 0
    while place + 4 <= rank:
        at = place * width + first
        e, f = get(inners, inner + place), get(inners, inner + place + 1)
        g, h = get(inners, inner + place + 2), get(inners, inner + place + 3)
        for n in range(count):
            one = e * number(b, at + n) + f * number(b, at + width + n)
            two = g * number(b, at + 2 * width + n) + h * number(b, at + 3 * width + n)
            put(sums, n, get(sums, n) + (one + two))
        place += 4
    while place < rank:
        at, e = place * width + first, get(inners, inner + place)
        for n in range(count):
            put(sums, n, get(sums, n) + e * number(b, at + n))
        place += 1


@inlined
def _sum_two(
    number: Any, b: int, first: int, width: int, inners: int, inner: int, rank: int, sums: int, count: int
) -> None:
    """The same of two rows, whose sums lie one behind the other: they share the numbers of b."""
    place = 0
    while place + 4 <= rank:
        at, own, other = place * width + first, inner + place, inner + rank + place
        c, d, e, f = get(inners, own), get(inners, own + 1), get(inners, own + 2), get(inners, own + 3)
        g, h, i, j = get(inners, other), get(inners, other + 1), get(inners, other + 2), get(inners, other + 3)
        for n in range(count):
            p, q = number(b, at + n), number(b, at + width + n)
            r, s = number(b, at + 2 * width + n), number(b, at + 3 * width + n)
            put(sums, n, get(sums, n) + ((c * p + d * q) + (e * r + f * s)))
            put(sums, count + n, get(sums, count + n) + ((g * p + h * q) + (i * r + j * s)))
        place += 4
    while place < rank:
        at, c, d = place * width + first, get(inners, inner + place), get(inners, inner + rank + place)
        for n in range(count):
            number_ = number(b, at + n)
            put(sums, n, get(sums, n) + c * number_)
            put(sums, count + n, get(sums, count + n) + d * number_)
        place += 1
