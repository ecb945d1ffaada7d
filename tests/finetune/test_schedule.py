"""Learning rates against transformers' schedules, and which rows a step takes against doing it by hand."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from flexbatch.errors import UsageError
from flexbatch.finetune.options import FinetuneOptions
from flexbatch.finetune.schedule import Course, LearningRate


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (3, 17), (17, 17), (30, 17), (1, 1)])
def test_rates_are_those_of_transformers(warmup: int, steps: int) -> None:
    for schedule in ("cosine", "constant"):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
        oracle = (
            get_cosine_schedule_with_warmup(optimizer, warmup, steps)
            if schedule == "cosine"
            else get_constant_schedule_with_warmup(optimizer, warmup)
        )
        rate = LearningRate(3e-4, steps, warmup, schedule)
        for step in range(steps):
            assert rate.at(step) == pytest.approx(oracle.get_last_lr()[0], rel=1e-12, abs=0)
            optimizer.step()
            oracle.step()


def test_steps_take_the_rows_in_order() -> None:
    rng = random.Random(0)
    for _ in range(200):
        rows, size, count = rng.randint(1, 40), rng.randint(1, 6), rng.randint(1, 4)
        epochs, most = rng.choice([None, 1, 2, 3]), rng.choice([None, 1, 5, 70])
        options = FinetuneOptions(batch_size=size, grad_accumulation=count, epochs=epochs, max_steps=most)
        course = Course.of(options, rows)
        by_hand: list[list[list[int]]] = []
        for _ in itertools.count():
            if epochs is None and most is None and by_hand:
                break
            if epochs is not None and len(by_hand) >= epochs * course.steps_per_epoch:
                break
            if epochs is None and most is not None and len(by_hand) >= most:
                break
            batches = [list(range(at, min(at + size, rows))) for at in range(0, rows, size)]
            by_hand += [batches[at : at + count] for at in range(0, len(batches), count)]
        by_hand = by_hand[:most]
        assert course.steps == len(by_hand)
        assert [[list(rows) for rows in course.batches(step)] for step in range(course.steps)] == by_hand


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank must be a whole number from 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"learning_rate": -1.0}, "learning_rate must be from 0"),
        ({"dropout": 1}, "dropout must be from 0 to below 1"),
        ({"optimizer": "adam"}, "optimizer must be adamw or sgd, not 'adam'"),
        ({"base_bits": 8}, "base_bits must be 16 or 4"),
        ({"target_modules": ("",)}, "target_modules must be all-linear or names"),
        ({"max_length": 1}, "max_length must be a whole number from 2"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
    ],
)
def test_wrong_values(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as error:
        FinetuneOptions(**wrong)  # type: ignore[arg-type]
    assert said in str(error.value)
