"""The scheduler as a pure machine: fake sweeps drive it, and every token must be computed in order, exactly once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.errors import InternalError
from flexbatch.requests import Request, TokenizedRequest
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.pages import PageAllocator
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.sweep import Sweep
from tests.plans import small_plan

WINDOW = 64
Rows = list[tuple[int, int]]


def sequences(rows: Rows, *, scoring: bool = False) -> list[Sequence]:
    made = []
    for index, (prompt, new) in enumerate(rows):
        params = SamplingParams(max_tokens=0 if scoring else new, echo=scoring, logprobs=0 if scoring else None)
        request = Request(id=str(index), prompt=tuple(range(prompt)), params=params)
        made.append(Sequence.of(TokenizedRequest(request, index, tuple(range(prompt))), WINDOW))
    return made


def drive(scheduler: Scheduler, ends: dict[int, int] | None = None) -> list[Sweep]:
    """Run to the end; row i stops early after ``ends[i]`` tokens. Checks what every sweep must obey."""
    sweeps = []
    while (sweep := scheduler.next_sweep()) is not None:
        sweeps.append(sweep)
        assert len(sweeps) < 5000
        reached: dict[str, int] = {}
        for piece in sweep.slices:
            sequence = piece.sequence
            name = sequence.source.request.id
            assert piece.start == reached.get(name, sequence.computed)
            reached[name] = piece.stop
            assert len(sequence.pages.pages) * 4 >= piece.stop
            assert piece.samples == (piece.stop == len(sequence.tokens) and sequence.wants_tokens)
        scheduler.computed(sweep)
        for sequence in {id(piece.sequence): piece.sequence for piece in sweep.slices}.values():
            if sequence.pending:
                continue
            if sequence.wants_tokens:
                sequence.tokens.append(len(sequence.tokens))
            limit = min(sequence.limit, sequence.prompt_len + (ends or {}).get(sequence.source.index, 10**6))
            if len(sequence.tokens) >= limit:
                scheduler.retire(sequence)
    return sweeps


@pytest.mark.parametrize("schedule", ["continuous", "block"])
@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=25),
    pages=st.integers(16, 40),
    micro=st.integers(1, 20),
    budget=st.integers(1, 50),
    most=st.integers(1, 12),
    fraction=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_every_row_ends_and_nothing_leaks(
    schedule: str, rows: Rows, pages: int, micro: int, budget: int, most: int, fraction: float, seed: int
) -> None:
    plan = small_plan(
        schedule=schedule,
        max_sequences=most,
        micro_batch_tokens=micro,
        micro_batch_sequences=1 + micro % 4,
        prompt_tokens_per_sweep=budget,
        kv_pages={"cpu": pages},
    )
    allocator = PageAllocator(pages)
    scheduler = Scheduler(plan, {"cpu": allocator}, expected_fraction=fraction)
    batch = sequences(rows)
    scheduler.add(batch)
    rng = random.Random(seed)
    ends = {index: rng.randint(1, 30) for index in range(len(rows)) if rng.random() < 0.5}
    for sweep in drive(scheduler, ends):
        assert len({piece.sequence.source.index for piece in sweep.slices}) <= most
        if schedule == "continuous":
            assert all(group.tokens <= micro for group in sweep.micro_batches)
    for index, sequence in enumerate(batch):
        assert sequence.tokens == list(range(min(sequence.limit, sequence.prompt_len + ends.get(index, 10**6))))
    allocator.check_idle()


def test_expected_lengths_of_one_never_preempt() -> None:
    plan = small_plan(kv_pages={"cpu": 20}, max_sequences=100)
    scheduler = Scheduler(plan, {"cpu": PageAllocator(20)})
    scheduler.add(sequences([(7, 20)] * 30))
    drive(scheduler)
    assert scheduler.preemptions == 0


def test_lengths_believed_too_short_preempt_the_youngest() -> None:
    plan = small_plan(kv_pages={"cpu": 20}, max_sequences=100)
    scheduler = Scheduler(plan, {"cpu": PageAllocator(20)}, expected_fraction=0.0)
    batch = sequences([(7, 20)] * 30)
    scheduler.add(batch)
    drive(scheduler)
    assert scheduler.preemptions > 0
    assert batch[0].preemptions == 0


def test_a_finished_place_is_refilled_at_the_next_sweep() -> None:
    plan = small_plan(max_sequences=2, prompt_tokens_per_sweep=100)
    scheduler = Scheduler(plan, {"cpu": PageAllocator(64)})
    scheduler.add(sequences([(3, 2), (3, 9), (3, 5)]))
    who = [{piece.sequence.source.index for piece in sweep.slices} for sweep in drive(scheduler)]
    assert who[:4] == [{0, 1}, {0, 1}, {1, 2}, {1, 2}]


def test_a_block_is_refilled_only_when_it_is_over() -> None:
    plan = small_plan(schedule="block", max_sequences=2, prompt_tokens_per_sweep=100)
    scheduler = Scheduler(plan, {"cpu": PageAllocator(64)})
    scheduler.add(sequences([(3, 2), (3, 4), (3, 5)]))
    who = [{piece.sequence.source.index for piece in sweep.slices} for sweep in drive(scheduler)]
    assert who == [{0, 1}, {0, 1}, {1}, {1}] + [{2}] * 5


def test_scored_prompts_cover_every_position_once() -> None:
    plan = small_plan(prompt_tokens_per_sweep=5, micro_batch_tokens=3)
    scheduler = Scheduler(plan, {"cpu": PageAllocator(64)})
    scheduler.add(sequences([(17, 0), (9, 0)], scoring=True))
    scored: dict[int, list[int]] = {0: [], 1: []}
    for sweep in drive(scheduler):
        for piece in sweep.slices:
            scored[piece.sequence.source.index] += range(piece.score_from, piece.score_to)
    assert scored == {0: list(range(16)), 1: list(range(8))}


def test_a_row_larger_than_the_pool_is_refused() -> None:
    scheduler = Scheduler(small_plan(), {"cpu": PageAllocator(2)})
    with pytest.raises(InternalError, match="never fit"):
        scheduler.add(sequences([(20, 5)]))
