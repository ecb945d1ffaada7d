"""Choosing tokens and their log-probabilities, against numpy written from the definition and transformers' warpers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flexbatch.kernels import sampling
from flexbatch.kernels.sampling import NO_TOKEN, choose, token_logprobs
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.randomness import uniform

SETTINGS = [
    SamplingParams(temperature=t, top_k=k, top_p=p)
    for t in (0.3, 1.0, 2.5)
    for k in (0, 1, 7, 60, 10_000)
    for p in (1.0, 0.95, 0.5, 0.05)
]
ONE = torch.finfo(torch.float64).eps
FAINT = 1e-12  # a share too small to aim at with a float64


def distribution(row: np.ndarray[Any, Any], params: SamplingParams, slack: float = 0.0) -> np.ndarray[Any, Any]:
    """The filtered distribution of one row, float64, by sorting everything: the definition, token by token.

    ``slack`` shifts the mass at which top-p cuts: a result between -slack and slack is within rounding of the border.
    """
    scaled = (row.astype(np.float32) / np.float32(params.temperature)).astype(np.float64)
    kept = np.ones(len(row), dtype=bool)
    if 0 < params.top_k < len(row):
        kept = scaled >= np.sort(scaled)[-params.top_k]
    weights = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
    weights /= weights.sum()
    if params.top_p < 1:
        # Falling score, among equals rising id; a token stays while the mass before it is below top_p.
        order = sorted(range(len(row)), key=lambda i: (-scaled[i], i))
        before = 0.0
        for place, token in enumerate(order):
            if place and before >= params.top_p + slack:
                kept[token] = False
            before += weights[token]
        weights = np.where(kept, weights, 0.0)
        weights /= weights.sum()
    return weights


def brute(row: np.ndarray[Any, Any], params: SamplingParams, u: float) -> set[int]:
    """The tokens that rounding may leave: by the definition, with the border and the number moved by 1e-9."""
    return {
        int(
            np.searchsorted(np.cumsum(distribution(row, params, slack)), min(max(u + shift, 0.0), 1.0 - 1e-15), "right")
        )
        for slack in (-1e-9, 0.0, 1e-9)
        for shift in (-1e-9, 0.0, 1e-9)
    }


def reachable(logits: Tensor, params: SamplingParams) -> set[int]:
    """The tokens that choose() returns for one row [V], asked at the middle of each token's share and on a grid."""
    shares = distribution(logits.numpy(), params, 1e-6)
    sums = np.cumsum(shares)
    numbers = [float(middle) for middle, share in zip(sums - shares / 2, shares, strict=True) if share > FAINT]
    numbers += [n / 2000 for n in range(2000)]
    return set(choose(logits.expand(len(numbers), -1), [params] * len(numbers), numbers).tolist())


def uniforms(count: int, seed: int = 0) -> list[float]:
    return [uniform(SamplingParams(seed=seed), "", position) for position in range(count)]


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("vocab", [5, 300, 2000])
def test_choice_equals_brute_force(vocab: int, spread: float) -> None:
    rows = len(SETTINGS) * 3
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    params, numbers = SETTINGS * 3, uniforms(rows)
    chosen = choose(logits, params, numbers).tolist()
    sure = 0
    for row in range(rows):
        possible = brute(logits[row].numpy(), params[row], numbers[row])
        assert chosen[row] in possible, (params[row], numbers[row])
        sure += len(possible) == 1
    assert sure > 0.95 * rows  # the tolerance decides next to nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_tokens_are_transformers(dtype: torch.dtype) -> None:
    """bfloat16 logits are full of equals: which of them top-p keeps is undefined in transformers, but not how many."""
    for seed, params in enumerate(SETTINGS):
        logits = (torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype).float()
        scores = TemperatureLogitsWarper(params.temperature)(None, logits[None])
        if params.top_k:
            scores = TopKLogitsWarper(params.top_k)(None, scores)
        if params.top_p < 1:
            scores = TopPLogitsWarper(params.top_p)(None, scores)
        theirs = set(scores[0].isfinite().nonzero().flatten().tolist())
        ours = reachable(logits, params)
        # Their running sum is fp32: a token whose border lies within its rounding may fall on either side.
        wide = distribution(logits.numpy(), params, 2e-6) > 0
        narrow = distribution(logits.numpy(), params, -2e-6) > 0
        shares = distribution(logits.numpy(), params)
        faint = (shares > 0) & (shares <= FAINT)
        for score in {float(logits[token]) for token in ours ^ theirs}:
            equals = (logits == score).nonzero().flatten().tolist()
            same = len(ours.intersection(equals)) == len(theirs.intersection(equals))
            rounding = (wide[equals] != narrow[equals]).any() or faint[equals].any()
            assert same or rounding, (params, score)


def test_ties_at_the_borders() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, 0.0]])
    grid = [n / 64 for n in range(64)]

    def seen(**settings: Any) -> set[int]:
        params = SamplingParams(temperature=1.0, **settings)
        return set(choose(logits.expand(64, -1), [params] * 64, grid).tolist())

    assert seen(top_k=1) == {1, 3}  # all that equal the k-th
    assert seen(top_k=3) == {0, 1, 2, 3, 4}
    assert seen(top_p=0.01) == {1}  # among equals the smaller id, as greedy
    assert seen(top_p=0.6) == {1, 3}
    assert seen(top_p=0.85) == {0, 1, 3}
    assert seen(top_p=1e-300) == {1}
    assert seen(top_k=1, top_p=0.5) == {1}  # half of what top_k leaves
    assert seen(top_k=1, top_p=0.51) == {1, 3}


@pytest.mark.parametrize("vocab", [50, 700])
def test_frequencies_follow_the_probabilities(vocab: int) -> None:
    count = 20_000 if vocab == 50 else 5_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    for params in (
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.9),
        SamplingParams(temperature=1, top_p=0.7),
    ):
        chosen = choose(logits.expand(count, -1), [params] * count, uniforms(count, seed=11))
        seen = np.bincount(chosen.numpy(), minlength=vocab)
        expected = distribution(logits.numpy(), params) * count
        assert seen[expected == 0].sum() == 0
        big = expected >= 5
        chi2 = ((seen[big] - expected[big]) ** 2 / expected[big]).sum()
        freedom = int(big.sum()) - 1
        assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom) + 4


def mixed(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, list[SamplingParams], list[float]]:
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocab, generator=generator) * torch.rand(rows, 1, generator=generator) * 6).to(dtype)
    params = [SamplingParams() if row % 5 == 0 else SETTINGS[(row * 7) % len(SETTINGS)] for row in range(rows)]
    return logits, params, uniforms(rows, seed=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, params, numbers = mixed(97, 1009, dtype)
    together = choose(logits, params, numbers)
    chosen, ids, values = token_logprobs(logits, together, 5)
    for row in range(97):
        one = slice(row, row + 1)
        assert torch.equal(choose(logits[one], params[one], numbers[one]), together[one])
        alone = token_logprobs(logits[one], together[one], 5)
        assert all(map(torch.equal, alone, (chosen[one], ids[one], values[one])))
    shuffled = torch.randperm(97, generator=torch.Generator().manual_seed(0)).tolist()
    moved = choose(logits[shuffled], [params[row] for row in shuffled], [numbers[row] for row in shuffled])
    assert torch.equal(moved, together[shuffled])
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1009 * 200)  # three rows a chunk
    assert torch.equal(choose(logits, params, numbers), together)
    again = token_logprobs(logits, together, 5)
    assert all(map(torch.equal, again, (chosen, ids, values)))


def test_logits_are_left_alone() -> None:
    logits, params, numbers = mixed(20, 100, torch.float32)
    before = logits.clone()
    token_logprobs(logits, choose(logits, params, numbers), 3)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 5e-324])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_coldest_is_greedy(temperature: float, scale: float) -> None:
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(3)) * scale
    for shifted in (logits, logits - 10 * scale):
        params = [SamplingParams(temperature=temperature, top_p=p, top_k=k) for p in (1.0, 0.5) for k in (0, 3)] * 2
        assert torch.equal(choose(shifted, params, uniforms(8)), shifted.argmax(dim=-1))


def test_hottest_is_uniform() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3)) * 5
    params = [SamplingParams(temperature=1e6)] * 1000
    chosen = choose(logits.expand(1000, -1), params, [(n + 0.5) / 1000 for n in range(1000)])
    assert torch.equal(chosen, torch.arange(1000))


def test_ends_of_the_unit_interval_and_impossible_tokens() -> None:
    logits = torch.full((1, 300), -math.inf)
    logits[0, [3, 50, 299]] = torch.tensor([1.0, 2.0, 1.5])
    for params in (SamplingParams(temperature=1), SamplingParams(temperature=1, top_p=0.999, top_k=200)):
        assert choose(logits, [params], [0.0]).item() == 3
        assert choose(logits, [params], [1 - ONE / 2]).item() == 299
        assert choose(logits, [params], [5e-324]).item() == 3
    logits[0, 299] = -math.inf
    assert choose(logits, [SamplingParams(temperature=1)], [1 - ONE / 2]).item() == 50
    assert choose(logits, [SamplingParams()], [0.5]).item() == 50
    for size in range(1, 200):  # the last token, whatever way the sum rounds
        assert choose(torch.zeros(1, size), [SamplingParams(temperature=1)], [1 - ONE / 2]).item() == size - 1
    huge = torch.zeros(1, 262_143)  # the largest sum of weights: nothing overflows
    assert choose(huge, [SamplingParams(temperature=1)], [1 - ONE / 2]).item() == 262_142
    assert choose(huge, [SamplingParams(temperature=1)], [0.5]).item() == 131_071


def test_rows_without_a_distribution_are_marked_and_harm_no_other() -> None:
    good = torch.randn(300, generator=torch.Generator().manual_seed(4))
    nan, nothing, endless = good.clone(), torch.full((300,), -math.inf), good.clone()
    nan[7], endless[9] = math.nan, math.inf
    for params in (SamplingParams(), *SETTINGS):
        alone = choose(good[None], [params], [0.4]).item()
        chosen = choose(torch.stack([nan, good, nothing, endless, good]), [params] * 5, [0.4] * 5).tolist()
        assert chosen == [NO_TOKEN, alone, NO_TOKEN, 9 if params.greedy else NO_TOKEN, alone]


def test_greedy_takes_the_smallest_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 5.0, 1.0]], dtype=torch.bfloat16)
    assert choose(logits, [SamplingParams()] * 2, [0.9] * 2).tolist() == [1, 0]
    assert choose(logits, [SamplingParams(), SamplingParams(temperature=1, top_k=1, top_p=0.1)], [0.9] * 2)[0] == 1


def test_no_rows() -> None:
    assert choose(torch.empty(0, 10), [], []).shape == (0,)
    assert [tuple(t.shape) for t in token_logprobs(torch.empty(0, 10), torch.empty(0, dtype=torch.int64), 3)] == [
        (0,),
        (0, 3),
        (0, 3),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("top", [0, 1, 5, 40, 1000])
def test_logprobs_equal_the_definition(dtype: torch.dtype, top: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(30, 40, generator=generator) * 3).to(dtype)
    if dtype == torch.float16:
        logits = (logits * 2).round() / 2  # many equals
    tokens = torch.randint(40, (30,), generator=generator)
    chosen, ids, values = token_logprobs(logits, tokens, top)
    exact = logits.double().numpy()
    exact = exact - exact.max(1, keepdims=True)
    exact = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    assert chosen.dtype == values.dtype == torch.float32
    np.testing.assert_allclose(chosen.numpy(), exact[np.arange(30), tokens.numpy()], atol=2e-6)
    for row in range(30):
        order = sorted(range(40), key=lambda i: (-float(logits[row, i]), i))[:top]
        assert ids[row].tolist() == order
        np.testing.assert_allclose(values[row].numpy(), exact[row, order], atol=2e-6)
    if top:
        assert torch.equal(ids[:, 0], choose(logits, [SamplingParams()] * 30, [0.0] * 30))


def test_logprobs_of_impossible_tokens() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    chosen, ids, values = token_logprobs(logits, torch.tensor([1]), 3)
    assert chosen.tolist() == [-math.inf]
    assert ids.tolist() == [[0, 2, 1]]
    assert values[0, :2].tolist() == pytest.approx([-math.log(2)] * 2)
    assert values[0, 2] == -math.inf


def peak(work: Any) -> int:
    """Most bytes of tensors alive at once during ``work()``, by the profiler's account of the allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    alive = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


@pytest.mark.parametrize("settings", [{"top_p": 0.999}, {"top_k": 9999, "top_p": 0.9}, {}], ids=str)
def test_working_memory_is_bounded(settings: dict[str, Any]) -> None:
    vocab, rows = 10_000, 300  # flat logits: the nucleus is wide, which is the costly way
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16) / 10
    params: Sequence[SamplingParams] = [SamplingParams(temperature=1, **settings)] * rows
    assert peak(lambda: choose(logits, params, [0.5] * rows)) <= sampling.CHUNK_BYTES
    tokens = torch.zeros(rows, dtype=torch.int64)
    assert peak(lambda: token_logprobs(logits, tokens, 20)) <= sampling.CHUNK_BYTES
