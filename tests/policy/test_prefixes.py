"""What a plan knows of shared prefixes: the tokens that really run, the pages that are really held, and the time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from flexbatch.options import EngineOptions
from flexbatch.policy.plan import Plan
from flexbatch.policy.search import choose
from flexbatch.policy.workload import Workload
from flexbatch.requests import Request, TokenizedRequest
from flexbatch.sampling import SamplingParams
from tests.policy.cases import machine, model, profile


def job(questions: int, answers: int, *, new: int, stem: int = 540, own: int = 60) -> list[TokenizedRequest]:
    """Rows that all begin with ``stem`` tokens; those of a question are alike but for the last ten tokens."""
    rng = random.Random(0)
    head = tuple(rng.randrange(50000) for _ in range(stem))
    rows = []
    for _ in range(questions):
        question = tuple(rng.randrange(50000) for _ in range(own - 10))
        rows += [(*head, *question, *(rng.randrange(50000) for _ in range(10))) for _ in range(answers)]
    params = SamplingParams(max_tokens=new, echo=not new, logprobs=None if new else 0)
    return [TokenizedRequest(Request(str(i), params, row), i, row) for i, row in enumerate(rows)]


def plan(workload: Workload, gpu: float = 0.0, cpu: float = 30.0, **options: object) -> Plan:
    size, units = model("opt-1.3b")
    figures = profile() if gpu else profile(gpu=None)
    budgets = machine(figures, gpu, cpu)
    chosen = EngineOptions(**options)  # type: ignore[arg-type]
    stored = size.shape.stored_dtype
    return choose("opt-1.3b", size, units, workload, chosen, budgets, figures, stored_dtype=stored)[0]


def test_each_distinct_page_is_computed_once() -> None:
    workload = Workload.of(job(5, 4, new=8))
    assert sum(workload.shared) == 64 * (19 * 8 + 5 * 3)  # eight pages of all rows, and one more of each question
    assert workload.prefixes == (576,) * 20
    assert Workload.of(job(5, 4, new=8), share_prefixes=False).shared == ()
    mean = workload.mean(2048, 64, {None: 24}, block=False)
    apart = replace(workload, shared=(), prefixes=()).mean(2048, 64, {None: 24}, block=False)
    rows = apart.prompt.readouts
    assert mean.prompt.tokens / rows == pytest.approx(600 - sum(workload.shared) / 20)
    assert apart.prompt.tokens / rows == pytest.approx(600)
    assert 7.5 < apart.pages - mean.pages <= sum(workload.shared) / 20 / 64
    assert mean.decode == apart.decode
    assert workload.mean(2048, 64, {None: 24}, block=True) == replace(apart, pages=10.0)


@pytest.mark.parametrize("new", [0, 16])
@pytest.mark.parametrize("gpu", [0.0, 6.0])
def test_plans_are_made_for_what_runs(new: int, gpu: float) -> None:
    requests = job(50, 4, new=new)
    shared = plan(Workload.of(requests), gpu)
    apart = plan(Workload.of(requests, share_prefixes=False), gpu)
    assert shared.predicted["job_s"] < apart.predicted["job_s"] / (4 if new == 0 else 2)
    per_row = [sum(found.kv_pages.values()) / found.max_sequences for found in (shared, apart)]
    assert per_row[0] < per_row[1] / 2
    for found in (shared, apart):
        assert all(tier.total <= tier.budget for tier in found.memory.values())


def test_a_fixed_block_shares_nothing() -> None:
    requests = job(20, 4, new=16)
    together = plan(Workload.of(requests), schedule="block")
    assert together == plan(Workload.of(requests, share_prefixes=False), schedule="block")
