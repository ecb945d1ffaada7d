"""How finetuning is cut and ordered: micro-batches of whole examples, their windows, and what a visit of a group does.

Pure: lengths in, plain data out. Two orders of backward: a reverse sweep, or riding on sweeps that only go forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

TaskKind = Literal["learn_embed", "learn_forward", "learn_loss", "learn_backward"]
Order = Literal["reverse", "riding"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of one example in a window: rows ``start`` to ``stop`` of its micro-batch; the example begins at ``first``.

    A row's position in its example is the row minus ``first``.
    """

    first: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Window:
    """Rows ``start`` to ``stop`` of a micro-batch that are computed together, cut by examples."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class LearningBatch:
    """Whole examples (by number) end to end: ``counts`` rows of each, and windows in the order of the rows."""

    examples: tuple[int, ...]
    counts: tuple[int, ...]
    windows: tuple[Window, ...]

    @property
    def tokens(self) -> int:
        """Rows."""
        return sum(self.counts)


def cut(counts: Sequence[int], window: int) -> list[LearningBatch]:
    """Cut examples of ``counts`` rows into micro-batches: as many whole ones as fill a window, or one that is longer.

    So a window never holds the end of one example and the beginning of another that goes on in the next window, and
    keys and values exist for one micro-batch at a time. Examples without rows are left out.
    """
    assert window >= 1
    batches: list[LearningBatch] = []
    open_: list[int] = []
    for number, count in enumerate(counts):
        if count == 0:
            continue
        if open_ and sum(counts[each] for each in open_) + count > window:
            batches.append(_batch(open_, counts, window))
            open_ = []
        open_.append(number)
    if open_:
        batches.append(_batch(open_, counts, window))
    return batches


def cut_batches(counts: Sequence[int], sizes: Sequence[int], window: int) -> list[LearningBatch]:
    """Cut examples as ``cut`` does, so many of them at a time: no micro-batch reaches over a border."""
    assert sum(sizes) == len(counts)
    batches: list[LearningBatch] = []
    first = 0
    for size in sizes:
        found = cut(counts[first : first + size], window)
        batches += [replace(each, examples=tuple(first + number for number in each.examples)) for each in found]
        first += size
    return batches


def _batch(examples: Sequence[int], counts: Sequence[int], window: int) -> LearningBatch:
    own = tuple(counts[each] for each in examples)
    windows: list[Window] = []
    if len(own) == 1:
        for start in range(0, own[0], window):
            stop = min(start + window, own[0])
            windows.append(Window(start, stop, (Piece(0, start, stop),)))
    else:
        pieces: list[Piece] = []
        row = 0
        for count in own:
            pieces.append(Piece(row, row, row + count))
            row += count
        windows.append(Window(0, row, tuple(pieces)))
    return LearningBatch(tuple(examples), own, tuple(windows))


@dataclass(frozen=True, slots=True)
class Task:
    """One micro-batch's work at one group."""

    kind: TaskKind
    batch: int


@dataclass(frozen=True, slots=True)
class Visit:
    """What is done while the weights of ``group`` are there."""

    group: int
    tasks: tuple[Task, ...]


def forward_order(layers: int, batches: int, first: int = 0) -> list[Visit]:
    """One sweep that only measures the loss, of ``batches`` micro-batches from number ``first`` on."""
    numbers = range(first, first + batches)
    return [Visit(group, tuple(Task(_forward(group, layers), each) for each in numbers)) for group in range(layers + 2)]


def reverse_order(layers: int, batches: int, lowest: int, first: int = 0) -> list[Visit]:
    """A sweep forward and one in reverse, down to group ``lowest``, the first with something to train."""
    back = tuple(Task("learn_backward", each) for each in range(first, first + batches))
    return forward_order(layers, batches, first) + [Visit(group, back) for group in _down(layers, lowest)]


def riding_sweeps(layers: int, batches: int, lowest: int, together: int = 1) -> list[dict[int, tuple[Task, ...]]]:
    """Sweeps that only go forward, as tasks by group: each takes in ``together`` micro-batches; others go a layer back.

    Micro-batch m goes forward in sweep m / together, and back through its j-th layer from the top j sweeps later. A
    group sees the micro-batches in the same order as in a reverse sweep, so sums of gradients are the same to the bit.
    """
    down = _down(layers, lowest)
    entering = [range(first, min(first + together, batches)) for first in range(0, batches, together)]
    sweeps: list[dict[int, tuple[Task, ...]]] = []
    for sweep in range(len(entering) + len(down)):
        tasks: dict[int, list[Task]] = {group: [] for group in range(layers + 2)}
        for depth, group in enumerate(down, start=1):
            if 0 <= sweep - depth < len(entering):
                tasks[group] += [Task("learn_backward", batch) for batch in entering[sweep - depth]]
        if sweep < len(entering):
            for group in range(layers + 2):
                tasks[group] += [Task(_forward(group, layers), batch) for batch in entering[sweep]]
        sweeps.append({group: tuple(own) for group, own in tasks.items()})
    return sweeps


def in_reverse(sweeps: Sequence[Mapping[int, tuple[Task, ...]]]) -> list[Visit]:
    """The tasks of (the last of some) riding sweeps as one sweep forward and one in reverse.

    Every group keeps the order of its tasks, so sums of gradients stay the same.
    """
    ahead: dict[int, list[Task]] = {}
    back: dict[int, list[Task]] = {}
    for sweep in sweeps:
        for group, tasks in sweep.items():
            for task in tasks:
                (back if task.kind == "learn_backward" else ahead).setdefault(group, []).append(task)
    forward = [Visit(group, tuple(ahead[group])) for group in sorted(ahead)]
    return forward + [Visit(group, tuple(back[group])) for group in sorted(back, reverse=True)]


def riding_order(layers: int, batches: int, lowest: int) -> list[Visit]:
    """The visits of ``riding_sweeps``, one sweep after the other."""
    sweeps = riding_sweeps(layers, batches, lowest)
    return [Visit(group, tasks) for sweep in sweeps for group, tasks in sweep.items()]


def _down(layers: int, lowest: int) -> list[int]:
    """The groups that backward passes, the last first; the head's part is done with the loss."""
    return list(range(layers, lowest - 1, -1))


def _forward(group: int, layers: int) -> TaskKind:
    if group == 0:
        return "learn_embed"
    return "learn_loss" if group == layers + 1 else "learn_forward"
