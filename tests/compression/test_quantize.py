"""Quantizers against exhaustive searches, naive error feedback, and what must hold for every weight."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from flexbatch.compression.feedback import InputMoments, quantize_calibrated
from flexbatch.compression.grids import searched_range
from flexbatch.compression.groups import GROUPS, Packed, dequantize, unpack_codes
from flexbatch.compression.quantize import Method, importance_of, quantize
from flexbatch.errors import ModelError

METHODS: list[Method] = ["minmax", "search"]


def weight_of(seed: int, shape: tuple[int, int]) -> Tensor:
    """Weights with heavy tails and an offset for each row, as linear layers have."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    return normal * (1 + normal.square()) * 0.02 + torch.randn(shape[0], 1, generator=generator) * 0.01


def error(packed: Packed, weight: Tensor) -> float:
    return float((dequantize(packed) - weight).square().sum())


def output_error(packed: Packed, weight: Tensor, moments: Tensor) -> float:
    difference = dequantize(packed) - weight
    return float(((difference @ moments) * difference).sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", GROUPS)
def test_weights_on_the_grid_stay(group: int, method: Method) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (6, 3, group)).float()
    codes[..., 0], codes[..., -1] = 0, 15
    scales, minimums = torch.rand(6, 3, 1).half().float(), torch.randn(6, 3, 1).half().float()
    weight = (codes * scales + minimums).view(6, -1)
    packed = quantize(weight, group=group, method=method)
    assert torch.equal(dequantize(packed), weight)
    assert torch.equal(unpack_codes(packed.codes, 3 * group).float(), codes.view(6, -1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_any_shape_and_each_group_alone(seed: int, method: Method) -> None:
    rng = random.Random(seed)
    group = rng.choice(GROUPS)
    shape = (rng.randint(1, 20), rng.choice([1, 31, group, group + 1, 3 * group - 1, 5 * group]))
    weight = weight_of(seed, shape).to(rng.choice([torch.float32, torch.float16, torch.bfloat16]))
    packed = quantize(weight, group=group, method=method)
    assert packed.shape == shape
    values = dequantize(packed)
    assert packed.minimums is not None
    for start in range(0, shape[1], group):
        part = weight[:, start : start + group].float()
        steps = packed.scales[:, start // group].float().unsqueeze(1)
        if method == "minmax":
            alone = quantize(part, group=group, method=method)
            assert torch.equal(dequantize(alone), values[:, start : start + group])
            slack = part.abs().amax() * 2**-9  # of the fp16 minimum and scale
            assert bool(((values[:, start : start + group] - part).abs() <= steps / 2 + slack).all())


def test_search_is_near_the_best_grid_there_is() -> None:
    weight = weight_of(7, (40, 32))
    importance = torch.ones(40, 32)
    scale, minimum = searched_range(weight, importance, torch.float16)
    found = nearest_error(weight, scale, minimum)
    lowest, highest = weight.aminmax(dim=1, keepdim=True)
    width = highest - lowest
    steps = [i / 50 for i in range(-2, 25)]
    grids = [(lowest + width * a, width * (1 - a - b) / 15) for a, b in itertools.product(steps, steps) if a + b < 0.9]
    best = torch.stack([nearest_error(weight, step, low) for low, step in grids]).amin(0)
    plain = nearest_error(weight, width / 15, lowest)
    assert float(found.sum()) < 1.05 * float(best.sum())
    assert float(found.sum()) < 0.85 * float(plain.sum())
    assert bool((found <= plain * 1.01 + 1e-9).all())


def nearest_error(weight: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    points = minimum.unsqueeze(-1) + scale.unsqueeze(-1) * torch.arange(16)  # [rows, 1, 16]
    return (weight.unsqueeze(-1) - points).abs().amin(-1).square().sum(-1)


def test_large_weights_count_more() -> None:
    importance = importance_of(torch.tensor([[3.0, -4.0, 0.0]]), 32)
    assert importance.shape == (1, 32)
    root_mean_square = (25 / 3) ** 0.5
    assert torch.allclose(importance[0, :3], torch.tensor([3.0, 4.0, 0.0]) + root_mean_square)
    assert float(importance[0, 3:].sum()) == 0


@pytest.mark.parametrize("method", METHODS)
def test_constant_and_zero_groups(method: Method) -> None:
    weight = torch.zeros(3, 100)
    weight[1] = 0.5
    weight[2, 64:] = -2.0
    assert torch.equal(dequantize(quantize(weight, method=method)), weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 4e6])
def test_what_does_not_fit_is_refused(bad: float, method: Method) -> None:
    weight = weight_of(1, (4, 130))
    weight[2, 129] = bad
    with pytest.raises(ModelError, match="4 bit"):
        quantize(weight, method=method)
    with pytest.raises(ModelError, match="4 bit"):
        quantize_calibrated(weight, torch.eye(130))


def inputs_of(seed: int, rows: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features // 4 + 1, features, generator=generator)
    few = torch.randn(rows, features // 4 + 1, generator=generator)
    return few @ mix + 0.3 * torch.randn(rows, features, generator=generator)


@pytest.mark.parametrize(("group", "features", "rows"), [(64, 200, 1000), (32, 96, 50), (128, 130, 300)])
def test_calibration_lowers_the_error_of_outputs(group: int, features: int, rows: int) -> None:
    weight = weight_of(3, (70, features))
    moments = InputMoments(features)
    for part in inputs_of(4, rows, features).split(37):
        moments.add(part.unsqueeze(0))
    assert moments.rows == rows
    plain = output_error(quantize(weight, group=group), weight, moments.total)
    before = output_error(quantize_calibrated(weight, moments.total, group=group, sweeps=0), weight, moments.total)
    after = output_error(quantize_calibrated(weight, moments.total, group=group, sweeps=2), weight, moments.total)
    assert after < before < 0.7 * plain


def test_error_feedback_equals_the_naive_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    # After a column is rounded, the others not yet rounded take their least-squares values, found from scratch.
    features = 24
    weight = weight_of(5, (5, features))
    inputs = inputs_of(6, 400, features)
    moments = inputs.t() @ inputs
    packed = quantize_calibrated(weight, moments, group=32, sweeps=0)
    assert packed.minimums is not None
    damped = moments.double() + torch.eye(features, dtype=torch.float64) * 0.01 * float(moments.diagonal().mean())
    scale, minimum = packed.scales.double(), packed.minimums.double()
    current = weight.double()
    expected = torch.empty_like(current)
    for column in range(features):
        codes = ((current[:, [column]] - minimum) / scale).round().clamp(0, 15)
        expected[:, [column]] = codes
        target = weight.double() - current  # what is lost so far, to be made up by the rest
        done = slice(0, column + 1)
        target[:, [column]] = weight[:, [column]].double() - (codes * scale + minimum)
        target[:, done] = weight[:, done].double() - (expected[:, done] * scale + minimum)
        rest = slice(column + 1, features)
        made_up = torch.linalg.solve(damped[rest, rest], damped[rest, done] @ target[:, done].t()).t()
        current[:, rest] = weight[:, rest].double() + made_up
    assert torch.equal(unpack_codes(packed.codes, features).double(), expected)


def test_descent_reaches_codes_that_no_single_change_improves() -> None:
    features = 12
    weight = weight_of(8, (6, features))
    inputs = inputs_of(9, 100, features)
    moments = inputs.t() @ inputs
    packed = quantize_calibrated(weight, moments, group=32, sweeps=12)
    damped = moments + torch.eye(features) * 0.01 * moments.diagonal().mean()
    best = [float(e) for e in errors_of_rows(dequantize(packed), weight, damped)]
    codes = unpack_codes(packed.codes, features).int()
    assert packed.minimums is not None
    improved = 0
    for column, step in itertools.product(range(features), (-1, 1)):
        changed = codes.clone()
        changed[:, column] = (changed[:, column] + step).clamp(0, 15)
        values = changed * packed.scales.float() + packed.minimums.float()
        found = errors_of_rows(values, weight, damped)
        improved += sum(float(now) < 0.995 * before for now, before in zip(found, best, strict=True))
    assert improved <= 1  # the last refit may have moved a grid


def errors_of_rows(values: Tensor, weight: Tensor, moments: Tensor) -> Tensor:
    difference = values - weight
    return ((difference @ moments) * difference).sum(1)


def test_no_samples_at_all_still_gives_codes() -> None:
    weight = weight_of(2, (5, 70))
    packed = quantize_calibrated(weight, torch.zeros(70, 70))
    assert error(packed, weight) < 1.1 * error(quantize(weight), weight)
