"""Lowering: whatever the routes, the Steps of many sweeps must respect order, buffers and data, in any legal timing."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

import pytest

from flexbatch.policy.footprint import UnitSize
from flexbatch.policy.weights import deal, grown_ring, least_ring
from flexbatch.requests import Request, TokenizedRequest
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.lowering import Lowerer, Routes
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.sweep import MicroBatch, Slice, Sweep
from flexbatch.units import Shares


def sequence(name: int) -> Sequence:
    request = Request(str(name), SamplingParams(max_tokens=5), prompt=(1,))
    return Sequence.of(TokenizedRequest(request, name, (1,) * 9), 100)


def random_routes(rng: random.Random) -> Routes:
    layers = rng.randint(1, 5)
    compute: Literal["gpu", "cpu"] = rng.choice(["gpu", "cpu"])
    groups = range(layers + 2)
    reads = {group: rng.randint(1, 9) for group in groups if rng.random() < 0.6}
    uploads = {group: rng.randint(1, 9) for group in groups if group in reads or rng.random() < 0.5}
    uploads = uploads if compute == "gpu" else {}
    return Routes(
        num_layers=layers,
        compute=compute,
        reads=reads,
        uploads=uploads,
        host_ring=max(reads.values(), default=0) + rng.randint(0, 30),
        gpu_ring=max(uploads.values(), default=0) + rng.randint(0, 30),
        gather=rng.choice([None, "cpu"]),
        cpu_attention=rng.random() < 0.5,
        lanes=rng.randint(1, 3),
    )


def random_sweep(rng: random.Random, number: int, routes: Routes, sequences: list[Sequence]) -> Sweep:
    tiers = ["gpu", "cpu", "disk"] if routes.compute == "gpu" else ["cpu", "disk"]
    batches: list[MicroBatch] = []
    last: Slice | None = None
    for _ in range(rng.randint(1, 4)):
        start = rng.choice([0, 3])
        piece = Slice(rng.choice(sequences), start, 1, False, start + 1, start + 1)
        if last is not None and batches[-1].kv == "disk" and rng.random() < 0.3:
            piece = last
        tier = rng.choice(tiers) if piece is not last else "disk"
        streamed = batches[-1].streamed if piece is last else routes.compute == "gpu" and rng.random() < 0.5
        batches.append(MicroBatch((piece,), tier, rng.choice(tiers), streamed and tier != "gpu"))
        last = piece
    return Sweep(number, tuple(batches))


class Replay:
    """Executes Steps in a random legal order and watches what each buffer holds."""

    def __init__(self, routes: Routes, rng: random.Random) -> None:
        self.routes = routes
        self.rng = rng
        self.done: set[int] = set()
        self.queues: dict[str, list[Step]] = {}
        self.host: dict[int, int] = {}  # first byte -> group
        self.gpu: dict[int, int] = {}
        self.lanes: dict[int, tuple[int, int]] = {}
        self.sweep = Sweep(0, ())

    def run(self, steps: list[Step], until: frozenset[int]) -> None:
        for step in steps:
            self.queues.setdefault(step.resource, []).append(step)
        while not until <= self.done:
            heads = [queue[0] for queue in self.queues.values() if queue and set(queue[0].after) <= self.done]
            assert heads, "deadlock"
            step = self.rng.choice(heads)
            self.queues[step.resource].pop(0)
            self.check(step)
            self.done.add(step.id)

    def place(self, ring: dict[int, int], step: Step, sizes: Mapping[int, int], capacity: int) -> None:
        """A group's bytes are written: whatever they touch is lost."""
        end = step.slot + sizes[step.group]
        assert 0 <= step.slot < end <= capacity
        for start, group in list(ring.items()):
            if start < end and step.slot < start + sizes[group]:
                del ring[start]
        ring[step.slot] = step.group

    def check(self, step: Step) -> None:
        routes = self.routes
        if step.kind == "read":
            self.place(self.host, step, routes.reads, routes.host_ring)
        elif step.kind == "upload":
            assert step.group not in routes.reads or step.group in self.host.values()
            self.place(self.gpu, step, routes.uploads, routes.gpu_ring)
        elif step.kind in ("embed", "project", "finish", "head"):
            if routes.compute == "gpu" and step.group in routes.uploads:
                assert step.group in self.gpu.values()
            if routes.compute == "cpu" and step.group in routes.reads:
                assert step.group in self.host.values()
        elif step.kind in ("kv_read", "kv_up") and self.lanes.get(step.slot) != (step.group, step.batch):
            self.lanes[step.slot] = (step.group, step.batch)
        elif step.kind == "attend" and routes.staged_kv(self.sweep.micro_batches[step.batch]):
            if all(piece.start == 0 for piece in self.sweep.micro_batches[step.batch].slices):
                self.lanes[step.slot] = (step.group, step.batch)
            assert self.lanes[step.slot] == (step.group, step.batch)
        elif step.kind in ("kv_down", "kv_write"):
            assert self.lanes[step.slot] == (step.group, step.batch)


@pytest.mark.parametrize("seed", range(150))
def test_any_legal_timing_is_safe(seed: int) -> None:
    rng = random.Random(seed)
    routes = random_routes(rng)
    lowerer = Lowerer(routes)
    replay = Replay(routes, rng)
    sequences = [sequence(i) for i in range(4)]
    reads = 0
    for number in range(5):
        sweep = random_sweep(rng, number, routes, sequences)
        lowered = lowerer.lower(sweep, more=number < 4)
        ids = [step.id for step in lowered.steps]
        assert ids == sorted(ids)
        assert all(before < step.id for step in lowered.steps for before in step.after)
        reads += sum(step.kind == "read" for step in lowered.steps)
        whole = [(g, b) for g in range(1, routes.num_layers + 1) for b in range(len(sweep.micro_batches))]
        for kind in ("project", "attend", "finish"):
            per = [(step.group, step.batch) for step in lowered.steps if step.kind == kind]
            assert sorted(per) == whole
            if kind != "finish":  # those that wait for the CPU may be finished after others
                assert per == whole
        replay.sweep = sweep
        replay.run(lowered.steps, lowered.until)
    # Each sweep reads every group on disk once, and the last one fetches nothing ahead.
    assert reads == 5 * len(routes.reads)


def test_a_resident_run_has_no_transfers() -> None:
    lowerer = Lowerer(Routes(num_layers=2, compute="cpu"))
    sweep = Sweep(1, (MicroBatch((Slice(sequence(0), 0, 1, True, 1, 1),)),) * 2)
    kinds = [step.kind for step in lowerer.lower(sweep, more=True).steps]
    assert set(kinds) == {"embed", "project", "attend", "finish", "head"}


def test_attention_elsewhere_overlaps_the_next_micro_batch() -> None:
    lowerer = Lowerer(Routes(num_layers=1, compute="gpu"))
    batches = tuple(MicroBatch((Slice(sequence(i), 0, 1, True, 1, 1),), "cpu", "gpu") for i in range(3))
    steps = lowerer.lower(Sweep(1, batches), more=False).steps
    on_gpu = [(step.kind, step.batch) for step in steps if step.resource == "gpu" and step.group == 1]
    assert on_gpu == [("project", 0), ("project", 1), ("finish", 0), ("project", 2), ("finish", 1), ("finish", 2)]


def test_the_gpu_attends_to_prompts_while_the_cpu_attends_to_decoding_rows() -> None:
    lowerer = Lowerer(Routes(num_layers=2, compute="gpu"))
    slices = [(Slice(sequence(i), 0, 1, True, 1, 1),) for i in range(3)]
    batches = (
        MicroBatch(slices[0], "cpu", "gpu"),
        MicroBatch(slices[1], "cpu", "gpu", streamed=True),
        MicroBatch(slices[2], "cpu", "gpu", streamed=True),
    )
    steps = lowerer.lower(Sweep(1, batches), more=False).steps
    assert [step.resource for step in steps if step.kind == "attend"] == ["cpu", "gpu", "gpu"] * 2
    on_gpu = [(step.kind, step.batch) for step in steps if step.resource == "gpu" and step.group == 1]
    prompts = [("project", 1), ("attend", 1), ("finish", 1), ("project", 2), ("attend", 2), ("finish", 2)]
    assert on_gpu == [("project", 0), *prompts, ("finish", 0)]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_prompt_that_was_cut_waits_for_its_first_part_wherever_it_stands(place: int) -> None:
    """Its second part reads pages that the first one has written, and attends after it."""
    others = [Slice(sequence(i), 3, 1, True, 4, 4) for i in range(4)]
    first = Slice(sequence(9), 0, 4, False, 4, 4)
    second = Slice(first.sequence, 4, 2, True, 6, 6)
    before, after = list(others[:2]), list(others[2:])
    before.insert(place, first)
    after.insert(2 - place, second)
    sweep = Sweep(1, (MicroBatch(tuple(before), "disk"), MicroBatch(tuple(after), "disk")))
    assert sweep.continues == (False, True)
    steps = Lowerer(Routes(num_layers=2, compute="cpu", lanes=2)).lower(sweep, more=False).steps
    for group in (1, 2):
        own = {(step.kind, step.batch): step for step in steps if step.group == group}
        assert own["kv_write", 0].id in own["kv_read", 1].after
        assert own["attend", 0].id in own["attend", 1].after


def test_weights_of_the_next_sweep_are_fetched_under_the_head() -> None:
    lowerer = Lowerer(Routes(num_layers=3, compute="cpu", reads={1: 7, 2: 7, 3: 7}, host_ring=14))
    sweep = Sweep(1, (MicroBatch((Slice(sequence(0), 0, 1, True, 1, 1),)),))
    first = lowerer.lower(sweep, more=True)
    ahead = [step for step in first.steps if step.kind == "read" and step.id not in first.until]
    assert [step.group for step in ahead] == [1, 2, 3, 1, 2]
    assert [step.group for step in lowerer.lower(sweep, more=False).steps if step.kind == "read"] == [3]


def test_a_ring_of_two_neighbours_reads_the_large_one_while_the_one_before_it_is_used() -> None:
    lowerer = Lowerer(Routes(num_layers=4, compute="cpu", reads={1: 1, 2: 1, 3: 1, 4: 1, 5: 4}, host_ring=5))
    sweep = Sweep(1, (MicroBatch((Slice(sequence(0), 0, 1, True, 1, 1),)),))
    for _ in range(4):
        steps = lowerer.lower(sweep, more=True).steps
        finished = {step.id: step.group for step in steps if step.kind == "finish"}
        head = next(step for step in steps if step.kind == "read" and step.group == 5)
        assert max(finished[other] for other in head.after if other in finished) == 3


@pytest.mark.parametrize("seed", range(20))
def test_places_in_a_ring_start_at_whole_blocks(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {group: 4096 * rng.randint(1, 9) for group in range(1, 8)}
    ring = least_ring(sizes) + 4096 * rng.randint(0, 9)
    lowerer = Lowerer(Routes(num_layers=6, compute="cpu", reads=sizes, host_ring=ring))
    sweep = Sweep(1, (MicroBatch((Slice(sequence(0), 0, 1, True, 1, 1),)),))
    for _ in range(5):
        steps = lowerer.lower(sweep, more=True).steps
        assert all(step.slot % 4096 == 0 for step in steps if step.kind == "read")


def test_rings_are_whole_blocks() -> None:
    units = [UnitSize(str(group), (group,), 12345 + group, 1, False, False) for group in range(1, 5)]
    placement = deal(units, Shares(0, 0, 1), compute="gpu")
    for groups, ring in ((placement.reads, placement.host_ring), (placement.uploads, placement.gpu_ring)):
        assert ring % 4096 == grown_ring(groups, 5000) % 4096 == grown_ring(groups, 10**9) % 4096 == 0
        assert all(nbytes % 4096 == 0 for nbytes in groups.values())
