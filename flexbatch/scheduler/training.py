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


class Riding:
    """Micro-batches on sweeps that only go forward: each goes forward in one of them, then back, a layer a sweep.

    A group sees the micro-batches in the same order as in a reverse sweep, whenever they enter, so sums of gradients
    are the same to the bit.
    """

    def __init__(self, layers: int, batches: int, lowest: int) -> None:
        self._layers = layers
        self._batches = batches
        self._down = _down(layers, lowest)
        self._entered = 0
        self._under_way: list[range] = []  # the newest first: by how many layers they went back, from none on
        self._backs = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self._entered == self._batches and not any(self._under_way)

    @property
    def done(self) -> float:
        """The part of the work that is done; a layer counts twice on the way back, where it is computed again."""
        total = self._batches * (self._layers + 2 * len(self._down))
        return (self._entered * self._layers + 2 * self._backs) / max(1, total)

    @property
    def waiting(self) -> range:
        """Micro-batches that have not entered."""
        return range(self._entered, self._batches)

    @property
    def returning(self) -> list[int]:
        """Micro-batches that go back in the next sweep, each through one layer."""
        return [batch for each in self._under_way for batch in each]

    def sweep(self, entering: int) -> dict[int, tuple[Task, ...]]:
        """The next sweep, which ``entering`` more micro-batches go forward in: tasks by group. It counts as done."""
        tasks: dict[int, list[Task]] = {group: [] for group in range(self._layers + 2)}
        for group, batches in zip(self._down, self._under_way, strict=False):
            tasks[group] += [Task("learn_backward", batch) for batch in batches]
            self._backs += len(batches)
        new = self.waiting[:entering]
        for group in tasks:
            tasks[group] += [Task(_forward(group, self._layers), batch) for batch in new]
        self._entered += len(new)
        self._under_way = [new, *self._under_way][: len(self._down)]
        return {group: tuple(own) for group, own in tasks.items()}


def riding_sweeps(layers: int, batches: int, lowest: int, together: int = 1) -> list[dict[int, tuple[Task, ...]]]:
    """Sweeps of ``Riding``, each of which ``together`` micro-batches enter, as long as there are any."""
    riding = Riding(layers, batches, lowest)
    sweeps = []
    while not riding.is_over:
        sweeps.append(riding.sweep(together))
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
