"""Every family through the whole engine, against transformers generating each row alone, in fp32."""

from __future__ import annotations

import functools
import random
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Result, TokenizedRequest
from flexbatch.runtime import engine as engine_module
from flexbatch.runtime.engine import Engine
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.units import Shares
from tests.oracle import Row, assert_equal, generate_alone, ragged_rows, requests_of
from tests.tiny import ALL_VARIANTS, FAMILIES, tiny_checkpoint

ROWS = 24
SETTINGS: dict[str, dict[str, Any]] = {
    "continuous": {},
    "one token a micro-batch": {"micro_batch": 1, "max_sequences": 3},
    "odd sizes": {"micro_batch": 13, "max_sequences": 7},
    "alone": {"max_sequences": 1},
    "block": {"schedule": "block", "micro_batch": 5, "max_sequences": 11},
}


def run(path: Path, requests: list[TokenizedRequest], **options: Any) -> list[Result]:
    folder = locate(str(path))
    with Engine(folder, None, EngineOptions(device="cpu", **options), Workload.of(requests)) as engine:
        return list(engine.run(requests))


def oracle(path: Path, family: str, variant: str, seed: int, shards: int = 1) -> list[Row]:
    rng = random.Random(seed)
    tiny_checkpoint(path, family, variant, shards=shards, seed=seed, rng=rng)
    vocab = locate(str(path)).shape.vocab_size
    return generate_alone(path, ragged_rows(rng, vocab, ROWS))


@pytest.mark.parametrize(("family", "variant"), ALL_VARIANTS)
def test_greedy_rows_equal_transformers(family: str, variant: str, tmp_path: Path) -> None:
    rows = oracle(tmp_path, family, variant, seed=1, shards=1 if variant == "plain" else 3)
    for options in SETTINGS.values():
        assert_equal(run(tmp_path, requests_of(rows), **options), rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_chosen_at_random(family: str, tmp_path: Path) -> None:
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")
    rows = oracle(tmp_path, family, "random", seed=seed, shards=1 + seed % 2)
    name = random.Random(seed).choice(list(SETTINGS))
    assert_equal(run(tmp_path, requests_of(rows), **SETTINGS[name]), rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_preemption_changes_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = oracle(tmp_path, family, "plain", seed=2)
    requests = requests_of(rows)
    monkeypatch.setattr(engine_module, "Scheduler", functools.partial(Scheduler, expected_fraction=0.0))
    monkeypatch.setattr("flexbatch.policy.memory.PAGE_TOKENS", 4)
    monkeypatch.setattr("flexbatch.policy.candidates.pages_of", lambda *_: {"cpu": 30})
    folder = locate(str(tmp_path))
    with Engine(folder, None, EngineOptions(device="cpu"), Workload.of(requests)) as engine:
        results = list(engine.run(requests))
        assert engine.snapshot().preemptions > 0
    assert_equal(results, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_transformers(family: str, tmp_path: Path) -> None:
    rows = oracle(tmp_path, family, "plain", seed=3)
    for result in run(tmp_path, requests_of(rows, logprobs=2, ignore_eos=False), micro_batch=11):
        row = rows[int(result.id)]
        assert result.logprobs is not None
        assert result.logprobs.tokens == row.tokens
        assert list(result.logprobs.token_logprobs) == pytest.approx(row.logprobs, abs=1e-4)
        for token, top in zip(result.logprobs.tokens, result.logprobs.top_logprobs, strict=True):
            assert len(top) == 2
            assert next(iter(top)) == token


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_weights_kept_as_stored_give_the_same_tokens(weights: str, tmp_path: Path) -> None:
    rng = random.Random(4)
    tiny_checkpoint(tmp_path, "llama", "plain", seed=4, dtype=getattr(torch, weights))
    rows = generate_alone(tmp_path, ragged_rows(rng, 149, ROWS))
    requests = requests_of(rows)
    folder = locate(str(tmp_path))
    with Engine(folder, None, EngineOptions(device="cpu"), Workload.of(requests)) as engine:
        plan = engine.plan
        assert plan.weights_dtype == "float32"
        wide = list(engine.run(requests))
    for percent in range(99, 0, -1):
        options = EngineOptions(device="cpu", cpu_memory=plan.memory["cpu"].total * percent // 100)
        with Engine(folder, None, options, Workload.of(requests)) as engine:
            if engine.plan.weights_dtype == "float32":
                continue
            assert engine.plan.weights_dtype == weights
            assert engine.plan.weights.disk == 0
            narrow = list(engine.run(requests))
            break
    assert_equal(wide, rows)
    assert_equal(narrow, rows)


def test_in_bf16_weights_converted_once_and_weights_converted_from_disk_are_as_near(tmp_path: Path) -> None:
    """Stored in fp16: rounded to bf16 when they are loaded, or before each product; as near as 8 bits are."""
    rng = random.Random(6)
    tiny_checkpoint(tmp_path, "llama", "plain", seed=6, dtype=torch.float16)
    requests = requests_of(generate_alone(tmp_path, ragged_rows(rng, 149, ROWS)), logprobs=2)

    def first(dtype: str, weights: Shares) -> torch.Tensor:
        settings = EngineOptions(device="cpu", dtype=dtype, weights=weights)  # type: ignore[arg-type]
        with Engine(locate(str(tmp_path)), None, settings, Workload.of(requests)) as engine:
            assert engine.plan.weights_dtype == dtype or not weights.cpu
            found = {result.id: result.logprobs for result in engine.run(requests)}
        return torch.tensor([found[request.request.id].token_logprobs[0] for request in requests])  # type: ignore[union-attr]

    exact = first("float32", Shares(0, 1, 0))
    found = [first("bfloat16", weights) for weights in (Shares(0, 1, 0), Shares(0, 0, 1))]
    for rounded in found:
        error = (rounded - exact).abs()
        assert 0 < error.mean() < 0.1
        assert error.max() < 0.5
    assert (found[0] - found[1]).abs().mean() < 0.1
    assert float(exact.std()) > 0.3, "or other tokens' would be as near"
