"""Shared prefixes through the whole engine: trees of prompts on every tier, against transformers and unshared runs."""

from __future__ import annotations

import functools
import random
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Request, Result, TokenizedRequest
from flexbatch.runtime import engine as engine_module
from flexbatch.runtime.engine import Engine
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.units import parse_shares
from tests.lora.peft_cases import configs, generate_with, make_adapters, requests_with
from tests.oracle import assert_equal, generate_alone, requests_of
from tests.placements import IN_THREE
from tests.tiny import FAMILIES, load_oracle, tiny_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cpu, odd sizes": {"micro_batch": 13, "max_sequences": 7},
    "cpu and disk": {"weights": "0,40,60", "kv": "0,50,50", "micro_batch": 40},
    **IN_THREE,
}
CLOSE = 5e-5  # fp32 products of other numbers of rows round differently


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexbatch.policy.memory.PAGE_TOKENS", 8)
    monkeypatch.setattr("flexbatch.policy.workload.PAGE_TOKENS", 8, raising=False)


def tree_of_prompts(rng: random.Random, vocab: int, count: int, longest: int = 90) -> list[tuple[int, ...]]:
    """Prompts most of which begin as another one does."""
    prompts: list[tuple[int, ...]] = []
    for _ in range(count):
        stem = rng.choice(prompts)[: rng.randint(8, longest - 10)] if prompts and rng.random() < 0.85 else ()
        tail = tuple(rng.randrange(vocab) for _ in range(rng.randint(1, longest - len(stem))))
        prompts.append(stem + tail)
    return prompts


def run(path: Path, requests: Sequence[TokenizedRequest], **options: Any) -> tuple[list[Result], dict[str, Any]]:
    for name in ("weights", "kv", "hidden"):
        if name in options:
            options[name] = parse_shares(options[name], name)
    options.setdefault("device", "cpu")
    with Engine(locate(str(path)), None, EngineOptions(**options), Workload.of(requests)) as engine:
        results = list(engine.run(requests))
        return results, {**engine.stats(), "page_tokens": engine.plan.page_tokens}


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_of_prompts_equal_transformers_on_every_tier(family: str, tmp_path: Path) -> None:
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    tiny_checkpoint(tmp_path, family, "random", seed=seed, shards=1 + seed % 3, rng=rng)
    vocab = locate(str(tmp_path)).shape.vocab_size
    rows = generate_alone(tmp_path, [(prompt, rng.randint(1, 8)) for prompt in tree_of_prompts(rng, vocab, 14)])
    number = FAMILIES.index(family) + seed
    names = list(SETTINGS)
    for name in {names[number % 5], names[(number + 2) % 5], names[(number + 4) % 5]}:
        print(name)
        results, stats = run(tmp_path, requests_of(rows), overlap=seed % 2 == 0, **SETTINGS[name])
        assert_equal(results, rows)
        assert stats["shared_prompt_tokens"] > 0 or stats["page_tokens"] > 16  # pages on disk fill whole blocks
        assert stats["prompt_tokens"] >= sum(len(row.prompt) for row in rows)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_preemption_and_lost_prefixes_change_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(6)
    tiny_checkpoint(tmp_path, family, "plain", seed=6)
    vocab = locate(str(tmp_path)).shape.vocab_size
    rows = generate_alone(tmp_path, [(prompt, rng.randint(8, 24)) for prompt in tree_of_prompts(rng, vocab, 24)])
    monkeypatch.setattr(engine_module, "Scheduler", functools.partial(Scheduler, expected_fraction=0.0))
    monkeypatch.setattr("flexbatch.policy.candidates.pages_of", lambda *_: {"cpu": 16})
    results, stats = run(tmp_path, requests_of(rows))
    assert_equal(results, rows)
    assert stats["preemptions"] > 0
    assert stats["shared_prompt_tokens"] > 0


def scored(prompt: tuple[int, ...], index: int, new: int, logprobs: int) -> TokenizedRequest:
    params = SamplingParams(max_tokens=new, echo=True, logprobs=logprobs, ignore_eos=True)
    return TokenizedRequest(Request(str(index), params, prompt), index, prompt)


@pytest.mark.parametrize("setting", [*SETTINGS, "preempted"])
def test_scores_equal_transformers(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = 7 if setting == "preempted" else secrets.randbelow(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    tiny_checkpoint(tmp_path, "llama", "plain", seed=7)
    longest = 160 if "kv" in SETTINGS.get(setting, {}) else 80  # there a page has 64 tokens
    prompts = tree_of_prompts(rng, 149, 20, longest)
    requests = [scored(prompt, i, rng.choice([0, 0, 8, 24]), rng.randint(0, 3)) for i, prompt in enumerate(prompts)]
    plain = tree_of_prompts(rng, 149, 1)[0]
    for index, prompt in enumerate([prompts[0], plain, plain], start=len(prompts)):  # leaders that score nothing
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        requests.append(TokenizedRequest(Request(str(index), params, prompt), index, prompt))
    requests.append(scored(plain, len(requests), 0, 2))
    if setting == "preempted":
        monkeypatch.setattr(engine_module, "Scheduler", functools.partial(Scheduler, expected_fraction=0.0))
        monkeypatch.setattr("flexbatch.policy.candidates.pages_of", lambda *_: {"cpu": 14})
    results, stats = run(tmp_path, requests, **SETTINGS.get(setting, {}))
    assert stats["shared_prompt_tokens"] > 0
    assert setting != "preempted" or stats["preemptions"] > 0
    model = load_oracle(tmp_path)
    for result in results:
        request = requests[int(result.id)]
        params = request.request.params
        if not params.echo:
            continue
        tokens = (*request.token_ids, *result.token_ids)
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        assert result.logprobs is not None
        assert result.logprobs.tokens == tokens
        assert result.logprobs.token_logprobs[0] is None
        own = expected[range(len(tokens) - 1), tokens[1:]].tolist()
        assert list(result.logprobs.token_logprobs[1:]) == pytest.approx(own, abs=1e-4)
        for place, top in enumerate(result.logprobs.top_logprobs[1:]):
            best = expected[place].topk(params.logprobs or 0).values.tolist()
            assert list(top.values()) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_rows_of_different_adapters_share_nothing(device: str, tmp_path: Path) -> None:
    rng = random.Random(11)
    path = tiny_checkpoint(tmp_path / "model", "llama", seed=11)
    settings = dict(list(configs("llama", rng).items())[:3])
    adapters = make_adapters(path, tmp_path / "adapters", settings, seed=11)
    stem = tuple(rng.randrange(149) for _ in range(40))
    names = [None, *adapters] * 4
    prompts = [(stem + tuple(rng.randrange(149) for _ in range(rng.randint(1, 9))), 6) for _ in names]
    rows = generate_with(path, adapters, prompts, names)
    requests = requests_with(rows, names)
    options = EngineOptions(device=device, max_sequences=5)
    with Engine(locate(str(path)), None, options, Workload.of(requests), adapters=adapters) as engine:
        results = list(engine.run(requests))
        assert engine.stats()["shared_prompt_tokens"] == 40 * (len(names) - 4)
    assert_equal(results, rows)


def test_rows_of_one_prompt_sample_as_they_would_alone(tmp_path: Path) -> None:
    rng = random.Random(8)
    tiny_checkpoint(tmp_path, "qwen2", "plain", seed=8)
    prompt = tuple(rng.randrange(100) for _ in range(50))
    requests = [
        TokenizedRequest(
            Request(str(i), SamplingParams(max_tokens=12, temperature=1.0, seed=i, ignore_eos=True), prompt), i, prompt
        )
        for i in range(12)
    ]
    together, stats = run(tmp_path, requests)
    assert stats["shared_prompt_tokens"] == 11 * 48
    alone = {result.id: result.token_ids for result in run(tmp_path, requests, share_prefixes=False)[0]}
    assert len(set(alone.values())) > 6
    assert {result.id: result.token_ids for result in together} == alone


def test_a_row_does_not_feel_who_else_shares_its_prefix(tmp_path: Path) -> None:
    """To the bit: the same pages, and products of the same rows, whoever computed the prefix and whoever reads it."""
    rng = random.Random(9)
    tiny_checkpoint(tmp_path, "llama", "plain", seed=9)
    stem = tuple(rng.randrange(149) for _ in range(40))
    tails = [tuple(rng.randrange(149) for _ in range(7)) for _ in range(6)]
    found: dict[int, list[tuple[float | None, ...]]] = {}
    for order in (range(6), reversed(range(6))):
        requests = [scored(stem + tails[at], at, 6, 2) for at in order]
        for result in run(tmp_path, requests, max_sequences=1)[0]:
            assert result.logprobs is not None
            found.setdefault(int(result.id), []).append(result.logprobs.token_logprobs)
    for at in range(1, 5):
        assert found[at][0] == found[at][1]
    for at in range(6):
        assert found[at][0][1:40] == found[0][0][1:40]


def test_sharing_changes_log_probabilities_by_rounding_only(tmp_path: Path) -> None:
    rng = random.Random(10)
    tiny_checkpoint(tmp_path, "llama", "plain", seed=10)
    requests = [scored(prompt, i, 6, 0) for i, prompt in enumerate(tree_of_prompts(rng, 149, 20))]
    found: dict[str, list[Any]] = {}
    for share in (True, False):
        results, stats = run(tmp_path, requests, share_prefixes=share)
        assert (stats["shared_prompt_tokens"] > 0) == share
        for result in results:
            assert result.logprobs is not None
            found.setdefault(result.id, []).append((result.token_ids, result.logprobs.token_logprobs[1:]))
    for (first_tokens, first), (second_tokens, second) in found.values():
        assert first_tokens == second_tokens
        assert list(first) == pytest.approx(list(second), abs=CLOSE)
