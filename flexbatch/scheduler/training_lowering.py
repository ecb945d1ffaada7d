"""Lowers the visits of finetuning to Steps: weights in the order of their use, saved inputs down and up. Pure.

Where sweeps turn round, weights that are still in a slot are used again. A group that has to make room is the one
whose next use is furthest away (Belady, 1966).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flexbatch.scheduler.lowering import Routes
from flexbatch.scheduler.step_list import Lowered, StepList
from flexbatch.scheduler.steps import Kind, Resource
from flexbatch.scheduler.training import LearningBatch, Task, TaskKind, Visit


@dataclass(slots=True)
class _Held:
    """Weights of a group: bytes ``start`` to ``stop`` of a ring, the Step that brought them, and their readers."""

    start: int
    stop: int
    step: int
    users: list[int] = field(default_factory=list)


class _Room:
    """A ring of bytes that hold groups: what lies where, and which Steps still read what lay there before."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self.held: dict[int, _Held] = {}
        self._gone: list[_Held] = []

    def place(self, nbytes: int, uses: Mapping[int, int], before: int) -> int | None:
        """Where ``nbytes`` may go if only what is used later than ``before`` is overwritten; None if nowhere.

        Of several places the one whose first loss comes last is taken. ``uses``: group -> its next use.
        """
        best: tuple[float, int] | None = None
        for start in sorted({0, *(piece.stop for piece in self.held.values())}):
            if start + nbytes > self._nbytes:
                continue
            lost = [uses.get(group, _NEVER) for group, piece in self.held.items() if _meet(piece, start, nbytes)]
            first = min(lost, default=_NEVER + 1)
            if first > before and (best is None or first > best[0]):
                best = first, start
        return None if best is None else best[1]

    def empty(self, start: int, nbytes: int) -> tuple[int, ...]:
        """Let go of what lies there; return the Steps that have to be done before something else comes."""
        for group in [group for group, piece in self.held.items() if _meet(piece, start, nbytes)]:
            self._gone.append(self.held.pop(group))
        left = [piece for piece in self._gone if _meet(piece, start, nbytes)]
        self._gone = [piece for piece in self._gone if not (start <= piece.start and piece.stop <= start + nbytes)]
        return tuple(step for piece in left for step in (piece.step, *piece.users))

    def put(self, group: int, start: int, nbytes: int, step: int) -> None:
        """Note what is brought."""
        self.held[group] = _Held(start, start + nbytes, step)

    def retire(self, group: int) -> None:
        """Let go of a group without something else in its place."""
        self._gone.append(self.held.pop(group))

    def emptied(self) -> _Room:
        """The same ring with nothing in it."""
        return _Room(self._nbytes)

    def forget(self, oldest: int) -> None:
        """Drop what nobody has to wait for any more: Steps before ``oldest``."""
        self._gone = [piece for piece in self._gone if max(piece.step, *piece.users, 0) >= oldest]


_NEVER = 1 << 60
_DONE = -1  # the id of a Step that nobody has to wait for


def _meet(piece: _Held, start: int, nbytes: int) -> bool:
    return piece.start < start + nbytes and start < piece.stop


class TrainingLowerer(StepList):
    """Turns one pass (a list of visits) after the other into Steps; slots keep what they hold from pass to pass.

    ``kept``: group -> tier on which the inputs of that group rest until backward; groups without backward are not in
    it.
    """

    def __init__(self, routes: Routes, kept: Mapping[int, str]) -> None:
        super().__init__()
        self._routes = routes
        self._kept = dict(kept)
        on_gpu = routes.compute == "gpu"
        self._streamed = routes.uploads if on_gpu else routes.reads
        self._room = _Room(routes.gpu_ring if on_gpu else routes.host_ring)
        self._way = _Room(routes.host_ring)  # of reads that go on to a GPU
        self._cursor = 0

    def lower(
        self,
        visits: Sequence[Visit],
        batches: Sequence[LearningBatch],
        *,
        more: bool = True,
        passage: Passage | None = None,
    ) -> Lowered:
        """Return the Steps of a pass in an order that a serial executor can follow.

        ``more``: another pass follows, whose first weights are fetched under the end of this one. ``passage``: one that
        began elsewhere and is to be brought to its end.
        """
        self.begin()
        self._room.forget(self._oldest)
        self._way.forget(self._oldest)
        groups = [visit.group for visit in visits if visit.tasks]
        following = [*groups, *(range(self._routes.num_layers + 2) if more else ())]
        saving = any(task.kind == "learn_backward" for visit in visits for task in visit.tasks)
        if passage is None:
            passage = Passage(self, self._routes, batches, self._kept if saving else {})
        passage.go_on(self)
        place = 0
        self._prefetch(following, 0)
        for visit in visits:
            if not visit.tasks:
                continue
            self._prefetch(following, place, needed=True)
            held = self._room.held.get(visit.group)
            steps = passage.visit(visit.group, visit.tasks, () if held is None else (held.step,))
            if held is not None:
                held.users += steps
            place += 1
            self._prefetch(following, place)
        return self.lowered()

    def forget(self) -> None:
        """Others have used the rings: nothing that was brought there is there any more, and all of it is done."""
        self._room, self._way = self._room.emptied(), self._way.emptied()
        self._cursor = 0

    def _prefetch(self, following: Sequence[int], place: int, *, needed: bool = False) -> None:
        """Fetch what is used from ``place`` on, to where nothing lies that is needed sooner.

        ``needed``: only what is used at ``place`` itself.
        """
        uses: dict[int, int] = {}
        for at in range(len(following) - 1, place - 1, -1):
            uses[following[at]] = at
        for at in range(place, min(place + 1, len(following)) if needed else len(following)):
            group = following[at]
            if group not in self._streamed or group in self._room.held:
                continue
            start = self._room.place(self._streamed[group], uses, at)
            if start is None:
                assert not needed, "a ring that holds less than its largest group"
                return
            self._fetch(group, start)

    def _fetch(self, group: int, start: int) -> None:
        nbytes = self._streamed[group]
        users = self._room.empty(start, nbytes)
        if self._routes.compute != "gpu":
            step = self.add("read", "disk_read", group, -1, 0, users, slot=start, prefetch=True)
        else:
            after = users
            if group in self._routes.reads:
                after = (*users, self._read(group))
            step = self.add("upload", "h2d", group, -1, 0, after, slot=start, prefetch=True)
            if group in self._way.held:
                self._way.held[group].users.append(step)
        self._room.put(group, start, nbytes, step)

    def _read(self, group: int) -> int:
        """From disk to the next bytes of the host's ring, round and round."""
        nbytes = self._routes.reads[group]
        if self._cursor + nbytes > self._routes.host_ring:
            self._cursor = 0
        users = self._way.empty(self._cursor, nbytes)
        step = self.add("read", "disk_read", group, -1, 0, users, slot=self._cursor, prefetch=True)
        if group in self._way.held:  # an older copy, elsewhere in the ring: its upload is long under way
            self._way.retire(group)
        self._way.put(group, self._cursor, nbytes, step)
        self._cursor += nbytes
        return step


class Passage:
    """A pass while it is lowered: the newest Step of every micro-batch, and transfers of saved inputs.

    ``steps`` is where Steps go; a pass that rides along changes it when what it rides on does.
    """

    def __init__(
        self, steps: StepList, routes: Routes, batches: Sequence[LearningBatch], kept: Mapping[int, str]
    ) -> None:
        self._steps = steps
        self._routes = routes
        self._batches = batches
        self._kept = kept
        self._newest: list[int | None] = [None] * len(batches)
        self._saved: dict[tuple[int, int], int] = {}
        self._outs: list[int] = []  # saves that end where the inputs rest
        self._backs: list[int] = []  # backward Steps whose inputs had to be brought

    def go_on(self, steps: StepList) -> None:
        """Add to ``steps`` from now on; all that was added elsewhere is done."""
        if steps is not self._steps:
            self._steps = steps
            self._newest = [None] * len(self._batches)
            self._saved = dict.fromkeys(self._saved, _DONE)
            self._outs = [_DONE] * len(self._outs)
            self._backs = [_DONE] * len(self._backs)

    def visit(self, group: int, tasks: Sequence[Task], weights: Sequence[int]) -> list[int]:
        """Add the Steps of ``tasks``; return the ids of those that read the group's weights, which are ``weights``."""
        return [self._task(task.kind, group, task.batch, weights) for task in tasks]

    def _task(self, kind: TaskKind, group: int, batch: int, weights: Sequence[int]) -> int:
        if kind == "learn_backward":
            return self._back(group, batch, weights)
        after: list[int | None] = [self._newest[batch], *weights]
        if kind == "learn_embed" and self._routes.gather is not None:
            after.append(self._add("learn_gather", self._routes.gather, group, batch, ()))
        if kind == "learn_forward" and len(self._outs) >= self._routes.lanes:
            after.append(self._outs[-self._routes.lanes])
        step = self._newest[batch] = self._add(kind, self._routes.compute, group, batch, after)
        if kind == "learn_forward":
            self._save(group, batch, step)
        return step

    def _save(self, group: int, batch: int, step: int) -> None:
        tier = self._kept.get(group, self._routes.compute)
        newest = step
        lane = len(self._outs) % self._routes.lanes
        if self._routes.compute == "gpu" and tier != "gpu":
            room = self._outs[-self._routes.lanes] if len(self._outs) >= self._routes.lanes else None
            newest = self._add("input_down", "d2h", group, batch, (newest, room), slot=lane)
        if tier == "disk":
            newest = self._add("input_write", "disk_write", group, batch, (newest,), slot=lane)
        if newest != step:
            self._saved[group, batch] = newest
            self._outs.append(newest)

    def _back(self, group: int, batch: int, weights: Sequence[int]) -> int:
        tier = self._kept.get(group, self._routes.compute)
        saved = self._saved.get((group, batch))
        if saved is None:
            return self._backward(group, batch, weights)
        room = self._backs[-self._routes.lanes] if len(self._backs) >= self._routes.lanes else None
        lane = len(self._backs) % self._routes.lanes
        if tier == "disk":
            saved = self._add("input_read", "disk_read", group, batch, (saved, room), slot=lane)
        if self._routes.compute == "gpu":
            saved = self._add("input_up", "h2d", group, batch, (saved, room), slot=lane)
        step = self._backward(group, batch, (*weights, saved))
        self._backs.append(step)
        return step

    def _backward(self, group: int, batch: int, after: Sequence[int]) -> int:
        step = self._newest[batch] = self._add(
            "learn_backward", self._routes.compute, group, batch, (self._newest[batch], *after)
        )
        return step

    def _add(
        self,
        kind: Kind,
        resource: Resource,
        group: int,
        batch: int,
        after: Iterable[int | None],
        *,
        slot: int = 0,
    ) -> int:
        return self._steps.add(kind, resource, group, batch, self._batches[batch].tokens, after, slot=slot)
