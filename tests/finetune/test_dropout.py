"""Dropout: masks that follow from keys, are even and independent, and the same in every pass over a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.finetune.dropout import Dropout, token_keys
from flexbatch.finetune.trainer import Trainer
from tests.finetune.oracle import filled, ragged
from tests.finetune.test_gradients import engine_options
from tests.tiny import tiny_checkpoint


def masks(rate: float, seed: int, examples: int, tokens: int, width: int, module: int = 1) -> torch.Tensor:
    ones = torch.ones(tokens, width)
    kept = [
        Dropout(rate, token_keys(seed, example, np.arange(tokens))).apply(ones, module) > 0
        for example in range(examples)
    ]
    return torch.stack(kept).float()


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_masks_are_even_and_independent(rate: float) -> None:
    kept = masks(rate, 3, 20, 64, 256)
    number = kept.numel()
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(float(kept.mean()) - (1 - rate)) < 5 * sigma / number**0.5
    centred = (kept - (1 - rate)) / sigma
    neighbours = [
        (centred[:, :, 1:], centred[:, :, :-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
        (centred, (masks(rate, 4, 20, 64, 256) - (1 - rate)) / sigma),
        (centred, (masks(rate, 3, 20, 64, 256, module=2) - (1 - rate)) / sigma),
    ]
    for one, two in neighbours:
        assert abs(float((one * two).mean())) < 5 / number**0.5
    # Over columns, tokens and examples, too: means scatter as independent draws do.
    for axes in ((0, 1), (0, 2), (1, 2)):
        means = centred.mean(axes) * (number / centred.mean(axes).numel()) ** 0.5
        assert float(means.abs().max()) < 5
        assert 0.6 < float(means.pow(2).mean()) < 1.6


def test_what_is_kept_is_divided_by_how_much() -> None:
    x = torch.randn(5, 7)
    dropped = Dropout(0.4, token_keys(0, 0, np.arange(5))).apply(x, 9)
    assert ((dropped == 0) | torch.isclose(dropped, x / 0.6)).all()
    rows = Dropout(0.4, token_keys(0, 0, np.arange(5))).rows(2, 4).apply(x[2:4], 9)
    assert torch.equal(rows, dropped[2:4])


def test_dropped_gradients_are_those_of_the_same_masks(tmp_path: Path) -> None:
    """The gradient is the slope of a loss whose masks are fixed: windows, order and grouping change nothing."""
    path = tiny_checkpoint(tmp_path, "llama")
    folder = locate(str(path))
    parameters = filled(folder.shape, rank=4, alpha=8, targets="all-linear", seed=5)
    rows = ragged(2, folder.shape.vocab_size, (20, 9, 31, 14))

    def run(window: int, order: Any = "reverse", *, single: bool = False, seen: int = 0, seed: int = 7) -> float:
        parameters.zero()
        with Trainer(
            folder, parameters, engine_options(), window=window, dropout=0.25, seed=seed, order=order
        ) as trainer:  # fmt: skip
            trainer.seen = seen
            calls = [[row] for row in rows] if single else [rows]
            return sum(trainer.accumulate(call, 0.5).total for call in calls)

    loss = run(512)
    expected = [parameters.gradient(name).clone() for name in parameters.names()]
    for options in ({"window": 1}, {"window": 7}, {"window": 8, "order": "riding"}, {"window": 512, "single": True}):
        assert run(**options) == pytest.approx(loss, rel=1e-6)
        for name, gradient in zip(parameters.names(), expected, strict=True):
            assert float((parameters.gradient(name) - gradient).norm() / gradient.norm()) < 2e-5
    assert run(512, seen=1) != loss
    assert run(512, seed=8) != loss

    generator = torch.Generator().manual_seed(0)
    whole = sum(float(gradient.norm() ** 2) for gradient in expected) ** 0.5
    number = sum(gradient.numel() for gradient in expected)
    directions = [  # half along the gradient, so that the slope is steep, half anywhere
        gradient + torch.randn(gradient.shape, generator=generator) * (whole / number**0.5) for gradient in expected
    ]
    slope = sum(float((one.double() * two.double()).sum()) for one, two in zip(expected, directions, strict=True))
    step = 1e-3 / sum(float(each.norm() ** 2) for each in directions) ** 0.5
    sides = []
    for sign in (1, -1, -1, 1):
        for name, direction in zip(parameters.names(), directions, strict=True):
            parameters.parameter(name).add_(direction, alpha=sign * step)
        sides.append(run(512))
    assert (sides[0] - sides[2]) * 0.5 / (2 * step) == pytest.approx(slope, rel=2e-2)
