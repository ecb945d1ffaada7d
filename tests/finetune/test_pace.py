"""How many micro-batches ride, against sums by hand and against whole trips."""

from __future__ import annotations

import random

import pytest

from flexbatch.finetune.pace import Pace
from flexbatch.scheduler.training import Riding, Task


def paced() -> Pace:
    """A second a token ahead through five layers and the loss; two tenths a layer back."""
    pace = Pace()
    pace.took("learn_forward", 10, 1.0, metered=False)
    pace.took("learn_loss", 10, 5.0, metered=False)
    pace.took("learn_backward", 10, 2.0, metered=False)
    return pace


def test_metered_tasks_count_only_while_there_are_no_others() -> None:
    pace = Pace()
    assert not pace.is_known
    pace.took("learn_forward", 10, 5.0, metered=True)
    assert pace.is_known
    assert pace.of("learn_forward") == 0.5
    assert pace.of("learn_backward") == 1.0  # a guess
    pace.took("learn_forward", 10, 1.0, metered=False)
    pace.took("learn_forward", 30, 3.0, metered=False)
    assert pace.of("learn_forward") == pytest.approx(0.1)


def test_as_many_enter_as_fit_in_this_sweep_and_the_next() -> None:
    pace, layers = paced(), 5
    riding = Riding(layers, 20, 1)
    tokens = [10] * 20
    assert Pace().entering(riding, tokens, layers, 1000.0) == (1, 0.0)  # nothing is known
    assert pace.entering(riding, tokens, layers, 35.0) == pytest.approx((3, 30.0))  # 10 s each ahead
    assert pace.entering(riding, tokens, layers, 9.0) == pytest.approx((1, 10.0))  # one, if there is nothing else
    riding.sweep(3)
    assert pace.entering(riding, tokens, layers, 9.0) == pytest.approx((0, 6.0))  # 2 s each back
    assert pace.entering(riding, tokens, layers, 16.1) == pytest.approx((1, 16.0))
    short = [10] * 3 + [1] * 17
    assert pace.entering(riding, short, layers, 7.3) == pytest.approx((1, 7.0))
    assert pace.entering(riding, short, layers, 8.3) == pytest.approx((2, 8.0))


@pytest.mark.parametrize("seed", range(20))
def test_trips_end_however_many_enter(seed: int) -> None:
    """Whatever the budget is, every micro-batch goes forward once, then back through all layers in their order."""
    rng = random.Random(seed)
    layers, batches = rng.randint(1, 6), rng.randint(1, 9)
    lowest = rng.randint(0, layers + 1)
    tokens = [rng.randint(1, 30) for _ in range(batches)]
    riding, pace = Riding(layers, batches, lowest), paced()
    seen: list[tuple[int, Task]] = []
    done = [riding.done]
    while not riding.is_over:
        entering, seconds = pace.entering(riding, tokens, layers, rng.uniform(0, 60))
        tasks = riding.sweep(entering)
        spent = sum(pace.of(task.kind) * tokens[task.batch] for own in tasks.values() for task in own)
        assert seconds == pytest.approx(spent)
        seen += [(group, task) for group, own in tasks.items() for task in own]
        done.append(riding.done)
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1.0)
    for batch in range(batches):
        way = [(task.kind, group) for group, task in seen if task.batch == batch]
        ahead = [("learn_embed", 0), *(("learn_forward", group) for group in range(1, layers + 1))]
        back = [("learn_backward", group) for group in range(layers, lowest - 1, -1)]
        assert way == [*ahead, ("learn_loss", layers + 1), *back]
    for group in range(layers + 1):
        order = [task.batch for own, task in seen if own == group and task.kind == "learn_backward"]
        assert order == sorted(order)
