"""Lowers sweeps to Steps: the zig-zag traversal with its transfers, dependencies and buffer slots. Pure.

Rings make budgets hold: a transfer to a place in a ring waits for the last use of what lay there. They also make
prefetch: weights are on their way as far ahead of their use as the ring has room, across the end of a sweep into the
next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flexbatch.scheduler.ring import Ring
from flexbatch.scheduler.step_list import Lowered, StepList
from flexbatch.scheduler.steps import Kind, Resource
from flexbatch.scheduler.sweep import MicroBatch, Sweep


@dataclass(frozen=True, slots=True)
class Routes:
    """How bytes travel in a run.

    ``compute``: where products run. ``reads``: bytes, by group, of weights on disk; ``uploads``: of those below the
    GPU. Buffers of ``host_ring`` and ``gpu_ring`` bytes hold them on their way. ``gather``: what fetches rows of a
    token embedding that does not rest where products run (None: it does). ``cpu_attention``: whether KV that rests
    below the GPU is attended to on the CPU, unless its micro-batch says otherwise. ``lanes``: micro-batches whose KV or
    hidden states are on their way at a time.
    """

    num_layers: int
    compute: Resource
    reads: Mapping[int, int] = field(default_factory=dict)
    uploads: Mapping[int, int] = field(default_factory=dict)
    host_ring: int = 0
    gpu_ring: int = 0
    gather: Resource | None = None
    cpu_attention: bool = True
    lanes: int = 2

    def staged_kv(self, batch: MicroBatch) -> bool:
        """Whether the pages of ``batch`` pass through a lane's buffer instead of being attended to where they rest."""
        if batch.kv == "disk":
            return True
        return self.compute == "gpu" and batch.kv == "cpu" and (batch.streamed or not self.cpu_attention)

    def attends_on(self, batch: MicroBatch) -> Resource:
        """Which resource computes the attention of ``batch``."""
        if self.compute == "gpu" and (batch.kv == "gpu" or batch.streamed or not self.cpu_attention):
            return "gpu"
        return "cpu"


class Lowerer(StepList):
    """Turns one sweep after the other into Steps, keeping the state of slots and prefetch between them."""

    def __init__(self, routes: Routes) -> None:
        super().__init__()
        self._routes = routes
        self._host = Ring(routes.reads, routes.host_ring)
        self._gpu = Ring(routes.uploads, routes.gpu_ring)
        self._rounds = 0  # of the rings, that may be fetched
        self._ahead = 0  # of them beyond this sweep's
        self._adapters: dict[int, tuple[int, ...]] = {}  # group -> what brings this sweep's adapters for it
        self._fetched: tuple[int, ...] = ()  # the last sweep's read of adapters for later ones
        self._stored: dict[int, tuple[int, ...]] = {}  # layer group -> the last sweep's writes of KV pages
        self._lanes: deque[tuple[int, tuple[int, ...]]] = deque((lane, ()) for lane in range(routes.lanes))
        self._ride: Ride | None = None

    def lower(self, sweep: Sweep, *, more: bool, ride: Ride | None = None) -> Lowered:
        """Return the Steps of ``sweep`` in an order that a serial executor can follow.

        Every micro-batch passes a layer before the next layer starts, so a layer's weights are fetched once. Where
        attention waits for another resource, a micro-batch is finished after the next one is projected, so that the
        two overlap; where the CPU attends to some and the GPU to others, the former after all of the latter. ``more``:
        another sweep follows, whose first weights may be fetched already. ``ride`` adds what others do with a group's
        weights while they are there.
        """
        self._ride = ride
        self.begin()
        flight = _Flight(self, sweep, self._routes)
        self._move_adapters(sweep)
        self._rounds += 1 + more - self._ahead
        self._ahead = int(more)
        self._fill()
        flight.embed()
        self._release(0, (*flight.newest, *self._ridden(0)))
        self._fill()
        lag = 1 if flight.waits and len(sweep.micro_batches) > 1 else 0
        open_: deque[tuple[int, int]] = deque()
        for group in range(1, self._routes.num_layers + 1):
            for batch in flight.batches:
                alone = flight.mixed and batch not in flight.patient
                while open_ and ((len(open_) > lag and not alone) or open_[0] == (group - 1, batch)):
                    self._close(flight, *open_.popleft())
                while open_ and not self._issued(group):
                    self._close(flight, *open_.popleft())
                flight.front(group, batch)
                if alone:
                    self._close(flight, group, batch)
                else:
                    open_.append((group, batch))
        while open_:
            self._close(flight, *open_.popleft())
        flight.head()
        self._release(self._routes.num_layers + 1, (*flight.newest, *self._ridden(self._routes.num_layers + 1)))
        self._fill()
        if sweep.adapters.fetches:  # last, for this sweep does not wait for them
            self._fetched = (self.add("adapter_read", "disk_read", 0, -1, 0, (), slot=1, prefetch=True),)
        return self.lowered()

    def _move_adapters(self, sweep: Sweep) -> None:
        """Adapters from disk to RAM, all at once; on a GPU from there to their pages, group by group."""
        moves = sweep.adapters
        self.require(self._fetched)
        arrived, self._fetched = self._fetched, ()
        if moves.reads:
            arrived = (*arrived, self.add("adapter_read", "disk_read", 0, -1, 0, ()))
        self._adapters = {}
        for group in range(self._routes.num_layers + 2):
            if self._routes.compute == "gpu" and moves.uploads:
                self._adapters[group] = (self.add("adapter_up", "h2d", group, -1, 0, arrived),)
            elif arrived:
                self._adapters[group] = arrived

    def _close(self, flight: _Flight, group: int, batch: int) -> None:
        """Finish a micro-batch's layer; after the last one the layer's weights make room for others."""
        flight.back(group, batch)
        flight.closed[group] = flight.closed.get(group, 0) + 1
        if flight.closed[group] == len(flight.batches):
            self._stored[group] = tuple(flight.written.pop(group, {}).values())
            self._release(group, (*flight.users, *self._ridden(group)))
            self._fill()

    def _ridden(self, group: int) -> list[int]:
        return [] if self._ride is None else self._ride(self, group, self.weights(group))

    # --- what a flight asks for ---------------------------------------------------------------------------------

    def weights(self, group: int) -> list[int]:
        """The ids after which the weights of ``group`` can be used, and the adapters' parts of it."""
        ring = self._gpu if self._routes.compute == "gpu" else self._host
        ready = [ring.ready[group].ready] if group in ring.ready else []
        return [*ready, *self._adapters.get(group, ())]

    def _issued(self, group: int) -> bool:
        """Whether the weights of ``group`` are in their ring or on their way there, or need none."""
        ring = self._gpu if self._routes.compute == "gpu" else self._host
        return group not in ring.groups or group in ring.ready

    def take_lane(self) -> tuple[int, tuple[int, ...]]:
        """The next lane, and the ids after which its buffers are free."""
        return self._lanes.popleft()

    def give_lane(self, lane: int, users: tuple[int, ...]) -> None:
        """Lane ``lane`` is free once ``users`` are done."""
        self._lanes.append((lane, users))

    def stored(self, group: int) -> tuple[int, ...]:
        """The ids after which all KV that earlier sweeps wrote in ``group`` is where it rests."""
        return self._stored.get(group, ())

    # --- rings ---------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Issue transfers of weights into every free place, in the order of their use."""
        going = True
        while going:
            going = self._read()
            while self._upload():
                going = True

    def _read(self) -> bool:
        taken = self._host.take(self._rounds)
        if taken is not None:
            group, place, users = taken
            place.ready = self.add("read", "disk_read", group, -1, 0, users, slot=place.start, prefetch=True)
        return taken is not None

    def _upload(self) -> bool:
        """Bring the next group to the GPU, unless its part from disk is not even asked for."""
        ring = self._gpu
        read = None
        if ring.groups and (group := ring.groups[ring.next]) in self._host.groups:
            read = self._host.ready.get(group)
            if read is None:
                return False
        taken = ring.take(self._rounds)
        if taken is None:
            return False
        group, place, users = taken
        after = users if read is None else (read.ready, *users)
        place.ready = self.add("upload", "h2d", group, -1, 0, after, slot=place.start, prefetch=True)
        if read is not None:
            self._host.free(group, (place.ready,))
        return True

    def _release(self, group: int, users: Iterable[int | None]) -> None:
        ring = self._gpu if self._routes.compute == "gpu" else self._host
        if group in ring.ready:
            ring.free(group, tuple(user for user in users if user is not None))


Ride = Callable[[Lowerer, int, list[int]], list[int]]
"""Adds Steps to a lowerer for a group whose weights are there after these ids; returns the ids that read them."""


class _Flight:
    """One sweep while it is lowered: the newest Step of every micro-batch, and what its layers have used."""

    def __init__(self, lowerer: Lowerer, sweep: Sweep, routes: Routes) -> None:
        self._lowerer = lowerer
        self._sweep = sweep
        self._routes = routes
        self.batches = range(len(sweep.micro_batches))
        self.newest: list[int | None] = [None] * len(sweep.micro_batches)
        self.users: list[int | None] = [None] * len(sweep.micro_batches)
        # Layer group -> the last write of each resource: when it is done, those before it are.
        self.written: dict[int, dict[Resource, int]] = {}
        self._last_attend: dict[int, int] = {}
        self._last_write: dict[int, int] = {}
        self._hidden_outs: list[int] = []
        self.closed: dict[int, int] = {}  # layer group -> micro-batches that are finished there
        self.patient = {place for place, batch in enumerate(sweep.micro_batches) if _elsewhere(routes, batch)}
        self.mixed = 0 < len(self.patient) < len(sweep.micro_batches)
        self.waits = any(
            routes.staged_kv(batch) or batch.hidden != _resting(routes) or routes.attends_on(batch) != routes.compute
            for batch in sweep.micro_batches
        )

    def embed(self) -> None:
        """Embed every micro-batch and put its hidden state where it waits."""
        weights = self._lowerer.weights(0)
        for batch in self.batches:
            gathered = None
            if self._routes.gather is not None:
                gathered = self._add("gather", self._routes.gather, 0, batch, ())
            self._advance("embed", self._routes.compute, 0, batch, (gathered, *weights))
            self._hidden_out(0, batch)

    def front(self, group: int, batch: int) -> None:
        """Up to and including attention: bring the hidden state and KV pages, project, attend, return the pages."""
        piece = self._sweep.micro_batches[batch]
        attends = self._routes.attends_on(piece)
        staged = self._routes.staged_kv(piece)
        pages: tuple[int, ...] = ()
        slot = 0
        if staged:
            slot, free = self._lowerer.take_lane()
            pages = self._pages_in(group, batch, attends, slot, free)
        self._hidden_in(group, batch)
        self._advance("project", self._routes.compute, group, batch, self._lowerer.weights(group))
        if attends != self._routes.compute:
            self._advance("qkv_down", "d2h", group, batch, ())
        attended = self._advance("attend", attends, group, batch, (*pages, self._before(batch)), slot=slot)
        self._last_attend[batch] = attended
        if staged:
            self._lowerer.give_lane(slot, (self._pages_out(group, batch, attends, slot, attended),))

    def back(self, group: int, batch: int) -> None:
        """What follows attention: its way up, the rest of the layer, and the hidden state's way back to where it waits.

        On its way up it would hold back whatever came after it, so it is asked for only now.
        """
        if batch in self.patient:
            self._advance("attended_up", "h2d", group, batch, ())
        self.users[batch] = self._advance("finish", self._routes.compute, group, batch, ())
        self._hidden_out(group, batch)

    def head(self) -> None:
        """Read off every micro-batch."""
        group = self._routes.num_layers + 1
        for batch in self.batches:
            self._hidden_in(group, batch)
            self._advance("head", self._routes.compute, group, batch, self._lowerer.weights(group))

    # --- parts ---------------------------------------------------------------------------------------------------

    def _pages_in(self, group: int, batch: int, attends: Resource, slot: int, free: tuple[int, ...]) -> tuple[int, ...]:
        """KV pages on their way to where they are attended to, and the ids after which they are there.

        Independent of the micro-batch's hidden state. Where no page holds anything yet, nothing has to travel, and
        nothing may: an empty transfer would still wait in line behind the weights of the next layers.
        """
        before = self._last_write.get(batch - 1) if self._sweep.continues[batch] else None
        ready = (*self._lowerer.stored(group), *free, *(() if before is None else (before,)))
        piece = self._sweep.micro_batches[batch]
        if all(part.start == 0 for part in piece.slices):
            return ready
        if piece.kv == "disk":
            ready = (self._add("kv_read", "disk_read", group, batch, ready, slot=slot),)
        if attends == "gpu":
            ready = (self._add("kv_up", "h2d", group, batch, ready, slot=slot),)
        return ready

    def _pages_out(self, group: int, batch: int, attends: Resource, slot: int, attended: int) -> int:
        """The pages that were written to, on their way back to where they rest."""
        newest = attended
        resource: Resource | None = None
        if attends == "gpu":
            newest, resource = self._add("kv_down", "d2h", group, batch, (newest,), slot=slot), "d2h"
        if self._sweep.micro_batches[batch].kv == "disk":
            newest, resource = self._add("kv_write", "disk_write", group, batch, (newest,), slot=slot), "disk_write"
        if resource is not None:
            self.written.setdefault(group, {})[resource] = newest
            self._last_write[batch] = newest
        return newest

    def _hidden_in(self, group: int, batch: int) -> None:
        rests = self._sweep.micro_batches[batch].hidden
        outs = self._hidden_outs
        room = outs[-self._routes.lanes] if len(outs) >= self._routes.lanes else None
        if rests == "disk":
            self._advance("hidden_read", "disk_read", group, batch, (room,))
        if self._routes.compute == "gpu" and rests != "gpu":
            self._advance("hidden_up", "h2d", group, batch, (room,))

    def _hidden_out(self, group: int, batch: int) -> None:
        rests = self._sweep.micro_batches[batch].hidden
        newest: int | None = None
        if self._routes.compute == "gpu" and rests != "gpu":
            newest = self._advance("hidden_down", "d2h", group, batch, ())
        if rests == "disk":
            newest = self._advance("hidden_write", "disk_write", group, batch, ())
        if newest is not None:
            self._hidden_outs.append(newest)

    def _before(self, batch: int) -> int | None:
        """The attention Step of the micro-batch before, if this one continues a prompt that was cut between them."""
        return self._last_attend[batch - 1] if self._sweep.continues[batch] else None

    def _advance(
        self, kind: Kind, resource: Resource, group: int, batch: int, others: Iterable[int | None], *, slot: int = 0
    ) -> int:
        """Add a Step that follows the micro-batch's newest one and becomes it."""
        step = self._add(kind, resource, group, batch, (self.newest[batch], *others), slot=slot)
        self.newest[batch] = step
        return step

    def _add(
        self, kind: Kind, resource: Resource, group: int, batch: int, after: Iterable[int | None], *, slot: int = 0
    ) -> int:
        tokens = self._sweep.micro_batches[batch].tokens
        return self._lowerer.add(kind, resource, group, batch, tokens, after, slot=slot)


def _elsewhere(routes: Routes, batch: MicroBatch) -> bool:
    """Whether the attention of ``batch`` is not where products run, so that waiting for it leaves them idle."""
    return routes.attends_on(batch) != routes.compute


def _resting(routes: Routes) -> str:
    """The tier on which hidden states are computed on: what rests there need not move."""
    return "gpu" if routes.compute == "gpu" else "cpu"
