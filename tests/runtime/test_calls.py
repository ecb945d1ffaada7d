"""One LLM, several jobs: each is planned for beside the weights as they lie; they move if it has no room there."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flexbatch import LLM, SamplingParams
from flexbatch.errors import DoesNotFitError
from flexbatch.policy.plan import Plan

MIB = 1 << 20
SMALL, LARGE = (1, 8, 2), (12, 200, 8)  # rows, prompt tokens, new tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose weights take twice what a job of one short row takes besides."""
    path = tmp_path_factory.mktemp("calls")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(vocab_size=2000, max_position_embeddings=256, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def ask(llm: LLM, job: tuple[int, int, int]) -> tuple[list[tuple[int, ...]], Plan]:
    """The tokens of a job, and the plan that it had."""
    rows, prompt, new = job
    rng = random.Random(rows)
    prompts = [[rng.randrange(3, 2000) for _ in range(prompt)] for _ in range(rows)]
    results = llm.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
    assert llm._engine is not None
    return [result.token_ids for result in results], llm._engine.plan


@dataclass(frozen=True)
class Known:
    """What the jobs give with all memory, the bytes of the weights, and what each job needs beside all of them."""

    tokens: dict[tuple[int, int, int], list[tuple[int, ...]]]
    weights: int
    needs: dict[tuple[int, int, int], int]


def resident(model: Path, budget: int) -> LLM:
    """One whose weights and KV are all in RAM."""
    return LLM(model, device="cpu", dtype="float32", cpu_memory=budget, weights="0,100,0", kv="0,100,0")


@pytest.fixture(scope="module")
def known(model: Path) -> Known:
    with LLM(model, device="cpu", dtype="float32") as llm:
        tokens = {job: ask(llm, job)[0] for job in (SMALL, LARGE)}
        assert llm._engine is not None
        weights = llm._engine.plan.memory["cpu"].weights
    needs = {}
    for job in (SMALL, LARGE):
        with resident(model, MIB) as llm, pytest.raises(DoesNotFitError) as caught:
            ask(llm, job)
        needs[job] = MIB + caught.value.missing
    return Known(tokens, weights, needs)


def test_a_plan_counts_the_weights_that_are_there(model: Path, known: Known) -> None:
    budget = known.needs[LARGE] + MIB
    with LLM(model, device="cpu", dtype="float32", cpu_memory=budget) as llm:
        ask(llm, SMALL)
        engine = llm._engine
        for job in (LARGE, SMALL, LARGE):
            found, plan = ask(llm, job)
            assert llm._engine is engine
            assert found == known.tokens[job]
            assert plan.memory["cpu"].weights == known.weights
            assert plan.memory["cpu"].total <= budget


def test_weights_move_for_a_job_that_has_no_room_beside_them(model: Path, known: Known) -> None:
    budget = (known.needs[SMALL] + known.needs[LARGE]) // 2
    with LLM(model, device="cpu", dtype="float32", cpu_memory=budget) as llm:
        found, plan = ask(llm, SMALL)
        assert found == known.tokens[SMALL]
        assert plan.memory["cpu"].weights == known.weights
        engine = llm._engine
        for job in (LARGE, SMALL):
            found, plan = ask(llm, job)
            assert llm._engine is not engine
            assert found == known.tokens[job]
            assert plan.weights.disk > 0
            assert plan.memory["cpu"].total <= budget


def test_no_row_fails_for_want_of_room_that_weights_could_make(model: Path, known: Known) -> None:
    """A short row would fit beside the weights as they lie, the long ones with it would not."""
    budget = (known.needs[SMALL] + known.needs[LARGE]) // 2
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 2000) for _ in range(prompt)] for prompt in (SMALL[1], *[LARGE[1]] * 15)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(model, device="cpu", dtype="float32") as llm:
        expected = [result.token_ids for result in llm.generate(prompts, params)]
    with LLM(model, device="cpu", dtype="float32", cpu_memory=budget) as llm:
        ask(llm, SMALL)
        results = llm.generate(prompts, params)
    assert [result.error for result in results] == [None] * len(prompts)
    assert [result.token_ids for result in results] == expected


def test_a_job_that_fits_in_no_way_is_refused_and_the_next_one_is_not(model: Path, known: Known) -> None:
    with resident(model, (known.needs[SMALL] + known.needs[LARGE]) // 2) as llm:
        assert ask(llm, SMALL)[0] == known.tokens[SMALL]
        with pytest.raises(DoesNotFitError, match="--cpu-memory"):
            ask(llm, LARGE)
        assert ask(llm, SMALL)[0] == known.tokens[SMALL]
