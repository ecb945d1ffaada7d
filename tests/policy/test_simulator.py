"""The simulator against timelines written down by hand, and its sums against the cost of micro-batches."""

from __future__ import annotations

import pytest

from flexbatch.policy.candidates import Trial, realise
from flexbatch.policy.cost import load_of
from flexbatch.policy.search import chosen
from flexbatch.policy.simulator import Simulator
from flexbatch.policy.verdict import simulated
from flexbatch.scheduler.step_list import Lowered
from flexbatch.scheduler.steps import Kind, Resource, Step
from tests.policy.cases import random_shop


def step(number: int, kind: Kind, resource: Resource, after: tuple[int, ...] = ()) -> Step:
    return Step(number, kind, resource, 1, 0, 1, after)


STEPS = [
    step(0, "upload", "h2d"),
    step(1, "project", "gpu", (0,)),
    step(2, "upload", "h2d"),
    step(3, "attend", "cpu", (1,)),
    step(4, "project", "gpu"),
    step(5, "finish", "gpu", (2, 3)),
    step(6, "upload", "h2d", (5,)),
]
SECONDS = {0: 2.0, 1: 1.0, 2: 4.0, 3: 5.0, 4: 2.0, 5: 1.0, 6: 3.0}
UNTIL = frozenset(range(6))


def test_overlap_by_hand() -> None:
    simulator = Simulator()
    timing = simulator.run(Lowered(STEPS, UNTIL), lambda one: SECONDS[one.id], 1)
    starts = {event.step.id: (event.start, event.end) for event in simulator.events}
    assert starts == {0: (0, 2), 1: (2, 3), 2: (2, 6), 3: (3, 8), 4: (3, 5), 5: (8, 9), 6: (9, 12)}
    assert timing.seconds == 9
    assert timing.busy_s == {"h2d": 9, "gpu": 4, "cpu": 5}
    assert timing.bottleneck == "h2d"
    assert timing.utilisation["cpu"] == pytest.approx(5 / 9)


def test_the_next_sweep_begins_with_results_and_finds_what_was_fetched() -> None:
    simulator = Simulator()
    simulator.run(Lowered(STEPS, UNTIL), lambda one: SECONDS[one.id], 1)
    following = [step(7, "project", "gpu", (6,)), step(8, "upload", "h2d")]
    timing = simulator.run(Lowered(following, frozenset({7})), lambda _: 1.0, 2)
    assert [(event.start, event.end) for event in simulator.events[-2:]] == [(12, 13), (12, 13)]
    assert (timing.start, timing.end) == (9, 13)


def test_without_overlap_steps_follow_one_another() -> None:
    timing = Simulator(overlap=False).run(Lowered(STEPS[:6], UNTIL), lambda one: SECONDS[one.id], 1)
    assert timing.seconds == sum(SECONDS[number] for number in range(6))


@pytest.mark.parametrize("seed", range(8))
def test_sums_over_steps_are_the_cost_of_micro_batches(seed: int) -> None:
    """What the program and the job estimate count is what the Steps of the real lowering add up to."""
    shop = random_shop(seed)
    candidates = realise(shop, [Trial(chosen(shop).candidate.choice, None, 1.0, shop.machine)])
    for candidate in candidates[:1]:
        setting = candidate.setting
        simulator = Simulator()
        timing = simulated(shop, candidate, layers=3, keep=simulator)
        if timing is None or candidate.choice.cut.block:
            continue
        cost = setting.cost.shortened(3)
        weights = setting.weights.shortened(shop.size.shape.num_layers, 3)
        expected: dict[str, float] = dict(cost.weights_s(weights))
        from flexbatch.policy.job import _parts  # what is compared is private on purpose
        from flexbatch.policy.sample import steady_sweep

        del _parts
        sweep = steady_sweep(
            shop.workload,
            candidate.choice.cut,
            setting.ways,
            candidate.choice.hidden,
            setting.sequences,
            on_gpu=shop.machine.compute == "gpu",
            max_positions=shop.size.shape.max_positions,
        )
        for batch in sweep.micro_batches:
            load = load_of(batch.slices, cost.page_tokens, cost.windows)
            way = batch.kv + ("_up" if batch.streamed else "")
            for resource, seconds in cost.batch_s(load, way, batch.hidden, weights).items():  # type: ignore[arg-type]
                expected[resource] = expected.get(resource, 0.0) + seconds
        for resource, seconds in timing.busy_s.items():
            assert seconds == pytest.approx(expected[resource], rel=1e-6, abs=1e-12), resource
