"""Runs that share prefixes against runs that do not: every tier, preempted, 4-bit KV, adapters, samples, scores.

The unshared run is the oracle here; ``test_prefixes`` and ``test_exact`` hold both against transformers.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexbatch.checkpoint.locate import locate
from flexbatch.options import EngineOptions
from flexbatch.policy import candidates
from flexbatch.policy.workload import Workload
from flexbatch.requests import Request, Result, TokenizedRequest
from flexbatch.runtime import engine as engine_module
from flexbatch.runtime.engine import Engine
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.units import parse_shares
from tests.lora.peft_cases import configs, make_adapters
from tests.placements import IN_THREE
from tests.tiny import tiny_checkpoint

DISK = {"weights": "0,40,60", "kv": "0,0,100", "micro_batch": 40}
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cpu, odd sizes": {"micro_batch": 13, "max_sequences": 7},
    "disk": DISK,
    "sim's GPU": {"device": "sim", "weights": "100,0,0", "kv": "100,0,0"},
    **IN_THREE,
}
VOCAB = 149
CLOSE = 1e-4  # rounding of fp32 sums that are cut elsewhere, through adapters that make much of it
NEAR_TIE = 1e-4
_DRAWS = 8  # of rows, until some are preempted


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexbatch.policy.memory.PAGE_TOKENS", 8)
    monkeypatch.setattr("flexbatch.policy.workload.PAGE_TOKENS", 8, raising=False)


def drawn(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(count))


def tree(rng: random.Random, count: int, longest: int) -> list[tuple[int, ...]]:
    """Prompts that branch off others at any place, stop short of them, or are the same."""
    prompts = [drawn(rng, longest // 2)]
    while len(prompts) < count:
        parent = rng.choice(prompts)
        kind = rng.random()
        if kind < 0.15:
            prompts.append(parent)
        elif kind < 0.3:
            prompts.append(parent[: rng.randint(1, len(parent))])
        else:
            stem = parent[: rng.randint(0 if kind > 0.9 else len(parent) // 2, longest - 5)]
            prompts.append(stem + drawn(rng, rng.randint(1, longest - len(stem))))
    return prompts


def mixed(rng: random.Random, count: int, longest: int, adapters: Sequence[str | None]) -> list[TokenizedRequest]:
    """Rows that generate, sample several times from one prompt, or score, of any adapter."""
    requests: list[TokenizedRequest] = []
    for prompt in tree(rng, count, longest):
        kind = rng.choice(["greedy", "sample", "score", "both"])
        new = {"score": 0}.get(kind, rng.randint(1, 16))
        lora = rng.choice(adapters)
        for copy in range(rng.randint(2, 4) if kind == "sample" else 1):
            place = len(requests)
            params = SamplingParams(
                max_tokens=new,
                temperature=1.0 if kind == "sample" else 0.0,
                seed=copy,
                echo=kind in ("score", "both"),
                logprobs=2,
                ignore_eos=True,
            )
            requests.append(TokenizedRequest(Request(str(place), params, prompt, lora=lora), place, prompt))
    return requests


def run(
    path: Path, requests: Sequence[TokenizedRequest], adapters: Mapping[str, Path] | None = None, **options: Any
) -> tuple[dict[str, Result], dict[str, Any]]:
    for name in ("weights", "kv", "hidden"):
        if name in options:
            options[name] = parse_shares(options[name], name)
    options.setdefault("device", "cpu")
    workload = Workload.of(requests, share_prefixes=options.get("share_prefixes", True))
    with Engine(locate(str(path)), None, EngineOptions(**options), workload, adapters=adapters or {}) as engine:
        results = {result.id: result for result in engine.run(requests)}
        return results, {**engine.stats(), "page_tokens": engine.plan.page_tokens}


def scarce(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """Room for little more than one row on each tier, and rows that are believed to stay short: some are preempted."""
    plenty = candidates.pages_of

    def few(shop: Any, choice: Any, *rest: Any) -> dict[str, int] | None:
        pages = plenty(shop, choice, *rest)
        most = 1 - -longest // choice.cut.page_tokens
        return None if pages is None else {tier: min(count, most) for tier, count in pages.items()}

    monkeypatch.setattr(candidates, "pages_of", few)
    monkeypatch.setattr(engine_module, "Scheduler", functools.partial(Scheduler, expected_fraction=0.0))


def assert_same(shared: Mapping[str, Result], alone: Mapping[str, Result], close: float = CLOSE) -> None:
    """Tokens and log-probabilities; a greedy row may part from the other at a near tie."""
    assert shared.keys() == alone.keys()
    excused = 0
    for name, expected in alone.items():
        found = shared[name]
        assert found.error is None
        assert found.logprobs is not None
        assert expected.logprobs is not None
        pairs = list(zip(found.logprobs.tokens, expected.logprobs.tokens, strict=True))
        same = next((place for place, (first, second) in enumerate(pairs) if first != second), len(pairs))
        if same < len(pairs):
            best, second = list(expected.logprobs.top_logprobs[same].values())[:2]
            assert best - second < NEAR_TIE, f"row {name} differs from token {same} on"
            excused += 1
        for values in (found.logprobs.token_logprobs, expected.logprobs.token_logprobs):
            assert len(values) == len(pairs)
        kept = [place for place in range(same) if expected.logprobs.token_logprobs[place] is not None]
        ours, theirs = ([each.logprobs.token_logprobs[place] for place in kept] for each in (found, expected))  # type: ignore[union-attr]
        assert ours == pytest.approx(theirs, abs=close)
        tops = zip(found.logprobs.top_logprobs[:same], expected.logprobs.top_logprobs[:same], strict=True)
        for top, other in tops:
            assert list(top.values()) == pytest.approx(list(other.values()), abs=close)
    assert excused <= 1


@pytest.mark.parametrize(
    ("setting", "preempted"),
    [
        (setting, preempted)
        for setting in SETTINGS
        for preempted in (False, True)
        if not preempted or "three" not in setting
    ],
)  # three tiers have room for a row each, so that few are preempted
def test_sharing_changes_nothing(
    setting: str, preempted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = 2 * list(SETTINGS).index(setting) + preempted
    rng = random.Random(seed)
    family = rng.choice(["llama", "qwen3", "mistral"])
    path = tiny_checkpoint(tmp_path / "model", family, "plain", seed=seed)
    adapters = make_adapters(path, tmp_path / "adapters", dict(list(configs(family, rng).items())[:2]), seed)
    options = SETTINGS[setting]
    longest = 180 if "disk" in setting or "three" in setting else 80  # pages on disk fill whole blocks
    for _ in range(_DRAWS if preempted else 1):
        requests = mixed(rng, 16, longest, [None, None, *adapters])
        overlap = rng.random() < 0.5
        alone, unshared = run(path, requests, adapters, share_prefixes=False, overlap=overlap, **options)
        assert unshared["shared_prompt_tokens"] == 0
        with monkeypatch.context() as patch:
            if preempted:
                scarce(patch, longest + 16)
            shared, stats = run(path, requests, adapters, overlap=overlap, **options)
        assert stats["shared_prompt_tokens"] > 0
        assert_same(shared, alone)
        if stats["preemptions"]:
            break
    assert stats["preemptions"] > 0 or not preempted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sharing_in_narrower_types(dtype: str, tmp_path: Path) -> None:
    rng = random.Random(11)
    path = tiny_checkpoint(tmp_path, rng.choice(["llama", "gpt2", "opt"]), "plain", seed=5)
    params = SamplingParams(max_tokens=0, echo=True, logprobs=0)
    requests = [
        TokenizedRequest(Request(str(place), params, prompt), place, prompt)
        for place, prompt in enumerate(tuple(token % 97 for token in prompt) for prompt in tree(rng, 16, 80))
    ]
    runs = [run(path, requests, share_prefixes=share, dtype=dtype) for share in (True, False)]
    assert [stats["shared_prompt_tokens"] > 0 for _, stats in runs] == [True, False]
    spread = 1.0 if dtype == "bfloat16" else 0.1  # of one row's log-probabilities, in a type of 8 or 11 bits
    assert max(distance(runs[0][0][name], runs[1][0][name]) for name in runs[0][0]) < spread


@pytest.mark.parametrize(("setting", "kv_bits"), [("cpu", 16), ("cpu", 4), ("disk", 16)])
def test_one_row_at_a_time_is_equal_to_the_bit(setting: str, kv_bits: int, tmp_path: Path) -> None:
    """Products of the same tokens, cut at the same places, over pages that another row filled or over one's own."""
    rng = random.Random(11)
    path = tiny_checkpoint(tmp_path, "llama", "plain", seed=rng.randrange(99))
    stem = 128  # two pages on disk
    stems = [drawn(rng, stem) for _ in range(3)]
    requests = []
    for place in range(12):
        prompt = rng.choice(stems) + drawn(rng, rng.randint(2, 30))
        params = SamplingParams(max_tokens=6, logprobs=2, ignore_eos=True, temperature=place % 2, seed=place)
        requests.append(TokenizedRequest(Request(str(place), params, prompt), place, prompt))
    options = {**SETTINGS[setting], "max_sequences": 1, "micro_batch": stem, "kv_bits": kv_bits}
    alone, _ = run(path, requests, share_prefixes=False, **options)
    shared, stats = run(path, requests, **options)
    assert stats["shared_prompt_tokens"] >= (9 - 3) * stem // 2  # one page of each stem, at least
    assert {name: (result.token_ids, result.logprobs) for name, result in shared.items()} == {
        name: (result.token_ids, result.logprobs) for name, result in alone.items()
    }


@pytest.mark.parametrize("preempted", [False, True])
@pytest.mark.parametrize("setting", ["cpu", "disk", "sim in three"])
def test_packed_pages_are_shared(
    setting: str, preempted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value at the border of two codes falls to either by the last bit of a product, so a few rows may differ."""
    rng = random.Random(3)
    path = tiny_checkpoint(tmp_path, "llama", "plain", seed=3)
    longest = 80 if setting == "cpu" else 180
    options = {**SETTINGS[setting], "kv_bits": 4}
    for _ in range(_DRAWS if preempted else 1):
        requests = mixed(rng, 10, longest, [None])
        alone, _ = run(path, requests, share_prefixes=False, **options)
        exact, _ = run(path, requests, share_prefixes=False, **SETTINGS[setting])
        with monkeypatch.context() as patch:
            if preempted:
                scarce(patch, longest + 16)
            shared, stats = run(path, requests, **options)
        assert stats["shared_prompt_tokens"] > 0
        different = [name for name in alone if shared[name].token_ids != alone[name].token_ids]
        assert len(different) <= len(alone) // 8
        off = [distance(shared[name], alone[name]) for name in alone if name not in different]
        same = [name for name in alone if exact[name].token_ids == alone[name].token_ids]
        packing = [distance(exact[name], alone[name]) for name in same]
        assert sorted(off)[len(off) // 2] < 0.1 * sorted(packing)[len(packing) // 2]
        if stats["preemptions"]:
            break
    assert stats["preemptions"] > 0 or not preempted


def distance(first: Result, second: Result) -> float:
    """The largest difference of two rows' log-probabilities."""
    assert first.logprobs is not None
    assert second.logprobs is not None
    pairs = zip(first.logprobs.token_logprobs, second.logprobs.token_logprobs, strict=True)
    return max((abs(one - other) for one, other in pairs if one is not None and other is not None), default=0.0)
