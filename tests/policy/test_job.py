"""The aggregate of a whole job against the sweeps that the scheduler makes of its rows."""

from __future__ import annotations

import random

import pytest

from flexbatch.options import EngineOptions
from flexbatch.policy.candidates import Shop
from flexbatch.policy.job import job_seconds, sweep_seconds
from flexbatch.policy.search import chosen
from flexbatch.policy.verdict import plan_of
from flexbatch.policy.workload import Workload
from flexbatch.requests import Request, TokenizedRequest
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.pages import PageAllocator
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.scheduler.sequence import Sequence
from tests.policy.cases import machine, model, profile


def predicted_and_scheduled(lengths: list[tuple[int, int]], in_flight: int) -> tuple[float, float]:
    """Seconds of a job of (prompt, new) tokens by the aggregate, and as the sum over the sweeps that are scheduled."""
    size, units = model("opt-125m")
    figures = profile(gpu=None)
    rows = [
        TokenizedRequest(Request(str(at), SamplingParams(max_tokens=new), (1,) * prompt), at, (1,) * prompt)
        for at, (prompt, new) in enumerate(lengths)
    ]
    options = EngineOptions(max_sequences=in_flight, share_prefixes=False)
    workload = Workload.of(rows, share_prefixes=False)
    shop = Shop("opt-125m", size, tuple(units), workload, options, machine(figures, 0, 20), figures, "float16")
    found = chosen(shop)
    plan, _ = plan_of(shop, found)
    pages = {tier: PageAllocator(count) for tier, count in plan.kv_pages.items()}
    scheduler = Scheduler(plan, pages)
    scheduler.add(sorted((Sequence.of(row, 2048) for row in rows), key=lambda row: row.prompt_len - row.limit))
    setting, seconds = found.candidate.setting, 0.0
    while (sweep := scheduler.next_sweep()) is not None:
        decoding = sum(piece.sequence.is_decoding for piece in sweep.slices)
        seconds += sweep_seconds(setting, decoding, sweep.tokens - decoding)
        scheduler.computed(sweep)
        for piece in sweep.slices:
            sequence = piece.sequence
            if sequence.pending == 0:
                sequence.tokens.append(1)
            if len(sequence.tokens) >= sequence.limit:
                scheduler.retire(sequence)
    return job_seconds(setting), seconds


@pytest.mark.parametrize(("rows", "in_flight"), [(24, 24), (128, 24), (100, 32), (500, 16), (333, 10)])
@pytest.mark.parametrize(("prompt", "new"), [(48, 16), (200, 8), (16, 64)])
def test_equal_rows_come_and_go_in_waves(rows: int, in_flight: int, prompt: int, new: int) -> None:
    predicted, scheduled = predicted_and_scheduled([(prompt, new)] * rows, in_flight)
    assert predicted == pytest.approx(scheduled, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_unequal_rows_spread(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [(rng.randint(16, 200), rng.randint(2, 60)) for _ in range(400)]
    predicted, scheduled = predicted_and_scheduled(lengths, 24)
    assert predicted == pytest.approx(scheduled, rel=0.1)
