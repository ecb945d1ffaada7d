"""Copies of matrices as one compiled kernel for a CPU; see ``copies``.

A piece of work is a matrix; one that is turned is turned in squares of 8 x 8 in registers. Numbers are never taken for
more than their bits: that one is not finite shows in the highest bit of a sum, which the sign has left.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexbatch.kernels.native import FREE, PIECE, launch
from flexbatch.kernels.numba_parts import (
    address_of,
    compiled,
    draw,
    inlined,
    load_long,
    peek_int,
    peek_long,
    peek_short,
    poke_int,
    poke_long,
    poke_short,
    turn_ints,
    turn_shorts,
)

# Columns of a task, and of a launch's record.
SOURCE, TARGET, ROWS, COLUMNS, TURNED, BYTES, FILL, INFINITE, FIELDS = range(9)
TASKS, COUNT = range(FREE, FREE + 2)

_BLOCK = 64  # columns of a turned matrix that are written at a time

_FILL = {
    torch.float32: 0x00800000_00800000,
    torch.float16: 0x0400_0400_0400_0400,
    torch.bfloat16: 0x0080_0080_0080_0080,
}
"""What brings the bits of infinity, without the sign, to the sign's place; for all numbers of 64 bits at once."""

_Long = np.uint64
_LOW_SHORTS, _LOW_INTS = _Long(0x7FFF_7FFF_7FFF_7FFF), _Long(0x7FFFFFFF_7FFFFFFF)


def copies(target: Tensor, source: Tensor) -> bool:
    """Whether the kernel copies ``source`` [count, rows, columns] to ``target``: of one type, whole or turned."""
    rows, columns = source.shape[1:]
    strides = source.stride()[1:]
    alike = target.dtype == source.dtype and target.dtype in _FILL
    return alike and target.stride()[1:] == (columns, 1) and strides in ((columns, 1), (1, rows))


def copy_finite(pairs: Sequence[tuple[Tensor, Tensor]], *, alone: bool) -> bool:
    """Copy what ``copies`` is true of: whether all numbers are finite."""
    if not pairs:
        return True
    tasks = np.concatenate([_tasks(target, source) for target, source in pairs])
    launch(_kernel(), [tasks.ctypes.data, len(tasks)], 1 if alone else len(tasks))
    return not tasks[:, INFINITE].any()


def _tasks(target: Tensor, source: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    count, rows, columns = source.shape
    turned = source.stride()[1:] != (columns, 1)
    tasks = np.empty((count, FIELDS), dtype=np.int64)
    numbers, nbytes = np.arange(count), source.itemsize
    tasks[:, SOURCE] = source.data_ptr() + numbers * source.stride(0) * nbytes
    tasks[:, TARGET] = target.data_ptr() + numbers * target.stride(0) * nbytes
    tasks[:, ROWS], tasks[:, COLUMNS] = rows, columns
    tasks[:, TURNED], tasks[:, BYTES], tasks[:, FILL] = turned, nbytes, _FILL[source.dtype]
    return tasks


@functools.cache
def _kernel() -> int:
    """Where the kernel begins."""

    def copy(record: int) -> None:
        while True:
            piece = draw(record, PIECE)
            if piece >= load_long(record, COUNT):
                break
            task = load_long(record, TASKS) + 8 * FIELDS * piece
            if load_long(task, BYTES) == 2:
                seen = _matrix(task, peek_short, poke_short, turn_shorts, 2, _LOW_SHORTS) & ~_LOW_SHORTS
            else:
                seen = _matrix(task, peek_int, poke_int, turn_ints, 4, _LOW_INTS) & ~_LOW_INTS
            poke_long(task, INFINITE, seen)

    return address_of(compiled(copy))


@inlined
def _matrix(task: int, peek: Any, poke: Any, turn: Any, size: int, low: np.uint64) -> np.uint64:
    """Copy a task's matrix of numbers of ``size`` bytes; what came of them all, of which the highest bits count."""
    rows, columns, fill = load_long(task, ROWS), load_long(task, COLUMNS), _Long(load_long(task, FILL))
    source, target = load_long(task, SOURCE), load_long(task, TARGET)
    seen = _Long(0)
    if load_long(task, TURNED) == 0:
        longs = size * rows * columns // 8
        for place in range(longs):
            numbers = peek_long(source, place)
            seen |= (numbers & low) + fill
            poke_long(target, place, numbers)
        for place in range(longs * (8 // size), rows * columns):
            number = peek(source, place)
            seen |= (number & low) + fill
            poke(target, place, number)
        return seen
    for first in range(0, columns, _BLOCK):  # there are [columns, rows]
        last = min(first + _BLOCK, columns)
        row = 0
        while row + 8 <= rows:
            column = first
            while column + 8 <= last:
                from_, to = source + size * (column * rows + row), target + size * (row * columns + column)
                seen |= turn(from_, size * rows, to, size * columns, fill)
                column += 8
            for own in range(row, row + 8):
                for left in range(column, last):
                    number = peek(source, left * rows + own)
                    seen |= (number & low) + fill
                    poke(target, own * columns + left, number)
            row += 8
        while row < rows:
            for column in range(first, last):
                number = peek(source, column * rows + row)
                seen |= (number & low) + fill
                poke(target, row * columns + column, number)
            row += 1
    return seen
