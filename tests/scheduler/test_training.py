"""Cutting and ordering of finetuning, and its Steps: every dependency, slot and budget, by brute force."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from flexbatch.scheduler.lowering import Routes
from flexbatch.scheduler.step_list import Lowered
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.training import (
    Visit,
    cut,
    cut_batches,
    forward_order,
    in_reverse,
    reverse_order,
    riding_order,
    riding_sweeps,
)
from flexbatch.scheduler.training_lowering import TrainingLowerer


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_in_one_window(seed: int) -> None:
    rng = random.Random(seed)
    counts = [rng.choice([0, 1, 2, rng.randint(3, 40)]) for _ in range(rng.randint(0, 12))]
    window = rng.choice([1, 3, 7, 16, 100])
    batches = cut(counts, window)
    assert [number for batch in batches for number in batch.examples] == [n for n, count in enumerate(counts) if count]
    for batch in batches:
        assert batch.counts == tuple(counts[number] for number in batch.examples)
        assert len(batch.examples) == 1 or batch.tokens <= window
        rows: list[int] = []
        for each in batch.windows:
            assert 0 < each.stop - each.start <= window
            assert [row for piece in each.pieces for row in range(piece.start, piece.stop)] == list(
                range(each.start, each.stop)
            )
            rows += range(each.start, each.stop)
            for piece in each.pieces:
                assert piece.first in [sum(batch.counts[:at]) for at in range(len(batch.counts))]
        assert rows == list(range(batch.tokens))


@pytest.mark.parametrize("seed", range(10))
def test_borders_of_batches_are_kept(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(0, 4) for _ in range(rng.randint(1, 4))]
    counts = [rng.choice([0, 1, rng.randint(2, 9)]) for _ in range(sum(sizes))]
    found = cut_batches(counts, sizes, 12)
    expected = []
    for number, size in enumerate(sizes):
        first = sum(sizes[:number])
        own = cut(counts[first : first + size], 12)
        expected += [(tuple(first + each for each in batch.examples), batch.counts, batch.windows) for batch in own]
    assert [(batch.examples, batch.counts, batch.windows) for batch in found] == expected


def in_groups(together: int, done: int) -> Callable[[int, int, int], list[Visit]]:
    """Riding with several micro-batches a sweep; after so many sweeps, what is left at once."""

    def order(layers: int, batches: int, lowest: int) -> list[Visit]:
        sweeps = riding_sweeps(layers, batches, lowest, together)
        ridden = [Visit(group, tasks) for sweep in sweeps[:done] for group, tasks in sweep.items()]
        return ridden + in_reverse(sweeps[done:])

    return order


@pytest.mark.parametrize(
    "order", [reverse_order, riding_order, in_groups(1, 0), in_groups(3, 2), in_groups(2, 5), in_groups(4, 99)]
)
@pytest.mark.parametrize("lowest", [0, 1, 3, 6])
def test_each_batch_passes_every_group_forward_then_back(order: object, lowest: int) -> None:
    layers, batches = 5, 4
    visits: list[Visit] = order(layers, batches, lowest)  # type: ignore[operator]
    for batch in range(batches):
        way = [(task.kind, visit.group) for visit in visits for task in visit.tasks if task.batch == batch]
        forward = [("learn_embed", 0), *(("learn_forward", group) for group in range(1, 6)), ("learn_loss", 6)]
        assert way == forward + [("learn_backward", group) for group in range(5, lowest - 1, -1)]
    for group in range(layers + 2):  # sums of gradients are over the micro-batches in their order
        for kind in ("learn_loss", "learn_backward"):
            seen = [t.batch for visit in visits if visit.group == group for t in visit.tasks if t.kind == kind]
            assert seen in ([], list(range(batches)))


def test_riding_only_goes_forward() -> None:
    groups = [visit.group for visit in riding_order(5, 3, 1)]
    assert groups == list(range(7)) * (3 + 5)


def precedes(steps: list[Step], passes: dict[int, set[int]]) -> dict[int, set[int]]:
    """All Steps that certainly run before each one: dependencies, the order of its resource, and earlier passes.

    ``passes``: the first Step of a pass -> what was waited for before it was submitted.
    """
    before: dict[int, set[int]] = {}
    last: dict[str, int] = {}
    done: set[int] = set()
    for step in steps:
        done |= {each for other in passes.get(step.id, ()) for each in {other} | before[other]}
        own = set(done)
        for other in [*step.after, *([last[step.resource]] if step.resource in last else [])]:
            own |= {other} | before.get(other, set())
        before[step.id] = own
        last[step.resource] = step.id
    return before


@pytest.mark.parametrize("seed", range(30))
def test_bytes_are_overwritten_only_after_their_last_use(seed: int) -> None:
    rng = random.Random(seed)
    layers = rng.randint(2, 6)
    compute: Any = rng.choice(["cpu", "gpu"])
    groups = list(range(layers + 2))
    size = {group: rng.randint(1, 9) for group in groups}
    uploads = rng.sample(groups, rng.randint(1, len(groups))) if compute == "gpu" else []
    reads = rng.sample(uploads or groups, rng.randint(0, len(uploads or groups)))
    routes = Routes(
        num_layers=layers,
        compute=compute,
        reads={group: size[group] for group in sorted(reads)},
        uploads={group: size[group] for group in sorted(uploads)},
        host_ring=9 + rng.randint(0, 20),
        gpu_ring=9 + rng.randint(0, 20),
    )
    tiers = ["cpu", "disk", "gpu"] if compute == "gpu" else ["cpu", "disk"]
    lowerer = TrainingLowerer(routes, {group: rng.choice(tiers) for group in range(1, layers + 1)})
    everything_: list[Step] = []
    runs: list[Lowered] = []
    passes: dict[int, set[int]] = {}
    for number in range(4):
        batches = cut([rng.randint(1, 9) for _ in range(rng.randint(1, 5))], 8)
        order = [reverse_order(layers, len(batches), 1), riding_order(layers, len(batches), 1)][number % 2]
        waited = {step for run in runs for step in run.until}
        lowered = lowerer.lower(forward_order(layers, len(batches)) if number == 2 else order, batches)
        assert {step.id for step in lowered.steps if step.kind.startswith("learn")} <= lowered.until
        passes[lowered.steps[0].id] = waited
        runs.append(lowered)
        everything_ += lowered.steps
    before = precedes(everything_, passes)
    place = {step.id: at for at, step in enumerate(everything_)}
    assert all(place[other] < place[step.id] for step in everything_ for other in step.after)
    check_ring("read", "learn" if compute == "cpu" else "upload", size, routes.host_ring, before, everything_)
    check_ring("upload", "learn", size, routes.gpu_ring, before, everything_)
    last = "upload" if compute == "gpu" else "read"
    for use in everything_:  # weights have come before they are used
        if use.kind.startswith("learn") and use.group in (uploads if compute == "gpu" else reads):
            fills = [s for s in everything_[: place[use.id]] if s.kind == last and s.group == use.group]
            assert fills[-1].id in before[use.id]
    for step in everything_:
        if step.kind in ("input_read", "input_up"):  # what comes back has been put away
            saves = [s for s in everything_ if s.kind in ("input_write", "input_down")]
            own = [s for s in saves if (s.group, s.batch) == (step.group, step.batch)]
            newest = [s for s in own if place[s.id] < place[step.id]][-1]
            assert newest.id in before[step.id]


def check_ring(
    kind: str, reader: str, size: dict[int, int], room: int, before: dict[int, set[int]], steps: list[Step]
) -> None:
    """What lay where something is brought to has been read by all that read it."""
    place = {step.id: at for at, step in enumerate(steps)}
    fills = [step for step in steps if step.kind == kind]
    for at, fill in enumerate(fills):
        assert 0 <= fill.slot <= room - size[fill.group]
        for older in fills[:at]:
            if older.slot < fill.slot + size[fill.group] and fill.slot < older.slot + size[older.group]:
                readers = [
                    step
                    for step in steps[place[older.id] : place[fill.id]]
                    if step.group == older.group and step.kind.startswith(reader)
                ]
                newest = {
                    step.id: [f for f in fills if f.group == step.group and place[f.id] < place[step.id]][-1]
                    for step in readers
                }
                assert all(step.id in before[fill.id] for step in readers if newest[step.id] is older)


def test_the_turn_uses_what_is_still_there() -> None:
    """Three passes over L groups with S slots: each turn saves S reads."""
    layers = 6
    routes = Routes(num_layers=layers, compute="cpu", reads=dict.fromkeys(range(1, layers + 1), 5), host_ring=10)
    lowerer = TrainingLowerer(routes, dict.fromkeys(range(1, layers + 1), "cpu"))
    reads = 0
    for _ in range(3):
        lowered = lowerer.lower(reverse_order(layers, 2, 1), cut([5, 5], 5))
        reads += sum(step.kind == "read" for step in lowered.steps)
    assert reads == 3 * (2 * layers - 2 * 2) + 2
