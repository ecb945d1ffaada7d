"""Scores of pairs of token ids, of continuations alone, at the window's edge, and results as they finish."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexbatch import LLM, SamplingParams
from flexbatch.checkpoint.locate import ASSETS
from flexbatch.errors import InputError, UsageError

DEMO = ASSETS / "demo"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", device="cpu", micro_batch=48) as model:
        yield model


@pytest.fixture(scope="module")
def oracle() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def expected(oracle: Any, context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """Log-probabilities of the continuation's tokens, and whether each is the first choice; the last one is not fed."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([[*context, *continuation][:-1]])).logits[0, len(context) - 1 :]
    found = logits.double().log_softmax(-1)
    return found[range(len(continuation)), continuation].tolist(), logits.argmax(-1).tolist() == continuation


def random_ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, 32000) for _ in range(count)]


def test_pairs_of_token_ids_are_scored_as_they_are(llm: LLM, oracle: Any) -> None:
    draw = random.Random(3)
    window = llm.window
    lengths = [(draw.randint(1, 150), draw.randint(1, 90)) for _ in range(12)]
    lengths += [(1, 1), (window, 1), (1, window), (window - 7, 8)]
    pairs = [(random_ids(draw, before), random_ids(draw, after)) for before, after in lengths]
    greedy = llm.generate([pairs[0][0]], SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids
    pairs.append((pairs[0][0], list(greedy)))
    scores = llm.score(pairs)
    for (context, continuation), score in zip(pairs, scores, strict=True):
        values, is_greedy = expected(oracle, context, continuation)
        assert score.token_ids == tuple(continuation)
        assert list(score.token_logprobs) == pytest.approx(values, abs=2e-4)
        assert score.is_greedy == is_greedy
    assert scores[-1].is_greedy


def test_scores_and_results_come_as_they_finish(llm: LLM) -> None:
    draw = random.Random(4)
    pairs = [(random_ids(draw, draw.randint(1, 60)), random_ids(draw, 3)) for _ in range(20)]
    assert dict(llm.score_each(pairs)) == dict(enumerate(llm.score(pairs)))
    prompts = [context for context, _ in pairs]
    params = [SamplingParams(max_tokens=draw.randint(1, 9)) for _ in pairs]
    each = list(llm.generate_each(prompts, params))
    assert [result for _, result in sorted(each, key=lambda pair: pair[0])] == llm.generate(prompts, params)
    assert [place for place, _ in each] != sorted(place for place, _ in each)


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        pytest.param(([], [5]), "must not be empty", id="no context"),
        pytest.param(([5], []), "must not be empty", id="no continuation"),
        pytest.param(("a", [5]), "both as text or both as token ids", id="mixed"),
        pytest.param(([5], [32000]), "outside the vocabulary", id="vocabulary"),
        pytest.param(([5] * 256, [5] * 2), "window 256", id="too long"),
    ],
)
def test_a_pair_that_cannot_be_scored_is_named(llm: LLM, pair: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=rf"pair 1: .*{complaint}"):
        llm.score([([5], [6]), pair])


def test_a_stop_token_ends_like_end_of_sequence(llm: LLM) -> None:
    plain = llm.generate("Once upon a time", SamplingParams(max_tokens=30))[0].token_ids
    stop = plain[12]
    until = plain.index(stop) + 1
    found = llm.generate("Once upon a time", SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(stop,)))[0]
    assert (found.token_ids, found.finish_reason) == (plain[:until], "stop")


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    with LLM(folder, device="cpu") as bare, pytest.raises(UsageError, match="tokenizer files"):
        _ = bare.tokenizer
