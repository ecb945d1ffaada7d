"""Cutting and ordering of finetuning, and its Steps: every dependency, slot and budget, by brute force."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from flexbatch.scheduler.lowering import Routes
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.training import Visit, cut, forward_order, reverse_order, riding_order
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


@pytest.mark.parametrize("order", [reverse_order, riding_order])
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


def replay(steps: list[Step], routes: Routes, state: dict[str, dict[int, int]]) -> Counter[str]:
    """Carry Steps out as the worst executor would: each FIFO may run ahead as far as dependencies allow."""
    done: set[int] = set()
    ids = {step.id for step in steps}
    bytes_in: Counter[str] = Counter()
    for step in steps:
        assert all(other in done or other not in ids for other in step.after), "waits for a later Step"
        done.add(step.id)
        bytes_in[step.kind] += 1
        if step.kind == "read":
            state["host"][step.slot] = step.group
            assert 0 <= step.slot < routes.host_slots
        if step.kind == "upload":
            if step.group in routes.reads:
                assert step.group in state["host"].values()
            state["gpu"][step.slot] = step.group
            assert 0 <= step.slot < routes.gpu_slots
        if step.kind.startswith("learn"):
            streamed = routes.uploads if routes.compute == "gpu" else routes.reads
            if step.group in streamed:
                held = state["gpu" if routes.compute == "gpu" else "host"]
                assert step.group in held.values(), "the weights are not there"
    return bytes_in


def precedes(steps: list[Step]) -> dict[int, set[int]]:
    """All Steps that certainly run before each one: dependencies and the order of its resource."""
    before: dict[int, set[int]] = {}
    last: dict[str, int] = {}
    for step in steps:
        own: set[int] = set()
        for other in [*step.after, *([last[step.resource]] if step.resource in last else [])]:
            own |= {other} | before.get(other, set())
        before[step.id] = own
        last[step.resource] = step.id
    return before


@pytest.mark.parametrize("seed", range(12))
def test_slots_are_filled_after_their_last_use(seed: int) -> None:
    rng = random.Random(seed)
    layers = rng.randint(2, 6)
    compute = rng.choice(["cpu", "gpu"])
    everything = list(range(layers + 2))
    uploads = tuple(sorted(rng.sample(everything, rng.randint(1, len(everything))))) if compute == "gpu" else ()
    pool = list(uploads) if compute == "gpu" else everything
    reads = tuple(sorted(rng.sample(pool, rng.randint(0, len(pool)))))
    routes = Routes(
        num_layers=layers,
        compute=compute,  # type: ignore[arg-type]
        reads=reads,
        uploads=uploads,
        host_slots=rng.randint(1, 3),
        gpu_slots=rng.randint(1, 3) if compute == "gpu" else 0,
    )
    kept = {
        group: rng.choice(["cpu", "disk"] + (["gpu"] if compute == "gpu" else [])) for group in range(1, layers + 1)
    }
    lowerer = TrainingLowerer(routes, kept)
    state: dict[str, dict[int, int]] = {"host": {}, "gpu": {}}
    everything_: list[Step] = []
    for number in range(4):
        batches = cut([rng.randint(1, 9) for _ in range(rng.randint(1, 5))], 8)
        order = [reverse_order(layers, len(batches), 1), riding_order(layers, len(batches), 1)][number % 2]
        visits = forward_order(layers, len(batches)) if number == 2 else order
        lowered = lowerer.lower(visits, batches)
        replay(lowered.steps, routes, state)
        everything_ += lowered.steps
        assert {step.id for step in lowered.steps if step.kind.startswith("learn")} <= lowered.until
    before = precedes(everything_)
    fills = [step for step in everything_ if step.kind == ("upload" if compute == "gpu" else "read")]
    uses = [step for step in everything_ if step.kind.startswith("learn")]
    holder: dict[int, Step] = {}
    position = {step.id: at for at, step in enumerate(everything_)}
    for fill in fills:
        previous = holder.get(fill.slot)
        if previous is not None:
            for use in uses:
                between = position[previous.id] < position[use.id] < position[fill.id]
                if between and use.group == previous.group:
                    newest = [f for f in fills if f.group == use.group and position[f.id] < position[use.id]][-1]
                    assert newest is not previous or use.id in before[fill.id], "overwritten while in use"
        holder[fill.slot] = fill
    for use in uses:  # and weights have come before they are used
        found = [fill for fill in fills if fill.group == use.group and position[fill.id] < position[use.id]]
        if found:
            assert found[-1].id in before[use.id]
    for step in everything_:
        if step.kind in ("input_read", "input_up"):  # what comes back has been put away
            saves = [s for s in everything_ if s.kind in ("input_write", "input_down")]
            own = [s for s in saves if (s.group, s.batch) == (step.group, step.batch)]
            newest = [s for s in own if position[s.id] < position[step.id]][-1]
            assert newest.id in before[step.id]


def test_the_turn_uses_what_is_still_there() -> None:
    """Three passes over L groups with S slots: each turn saves S reads."""
    layers = 6
    routes = Routes(num_layers=layers, compute="cpu", reads=tuple(range(1, layers + 1)), host_slots=2)
    lowerer = TrainingLowerer(routes, dict.fromkeys(range(1, layers + 1), "cpu"))
    reads = 0
    for _ in range(3):
        lowered = lowerer.lower(reverse_order(layers, 2, 1), cut([5, 5], 5))
        reads += sum(step.kind == "read" for step in lowered.steps)
    assert reads == 3 * (2 * layers - 2 * 2) + 2
