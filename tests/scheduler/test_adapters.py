"""Adapters and KV in one pool under arbitrary arrivals, growth and release; the arena; and who is admitted first."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.errors import InternalError
from flexbatch.options import Schedule
from flexbatch.requests import Request, TokenizedRequest
from flexbatch.runtime.adapter_rows import AdapterRows
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.adapters import AdapterCache, AdapterSize
from flexbatch.scheduler.extents import Extents
from flexbatch.scheduler.pages import PageAllocator, PageTable
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.scheduler.sequence import Sequence
from tests.plans import small_plan

NAMES = [f"a{number}" for number in range(6)]


@given(
    capacity=st.integers(0, 60),
    actions=st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60),
)
def test_extents_neither_overlap_nor_leak(capacity: int, actions: list[tuple[bool, int]]) -> None:
    extents = Extents(capacity)
    taken: dict[int, int] = {}
    for take, length in actions:
        if take:
            start = extents.take(length)
            free = sorted(set(range(capacity)) - {b for s, n in taken.items() for b in range(s, s + n)})
            fits = any(set(range(s, s + length)) <= set(free) for s in free)
            assert (start is not None) == fits
            if start is not None:
                assert not any(s < start + length and start < s + n for s, n in taken.items())
                assert start + length <= capacity
                taken[start] = length
        elif taken:
            start = sorted(taken)[length % len(taken)]
            extents.give(start)
            del taken[start]
        assert extents.used == sum(taken.values())
        assert 0 <= extents.fragmentation <= 1
    for start in taken:
        extents.give(start)
    assert extents.largest == capacity
    with pytest.raises(InternalError, match="not taken"):
        extents.give(0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["use", "leave", "grow", "free", "sweep", "fetch"]), st.integers(0, 5), st.integers(1, 8)
    ),
    max_size=80,
)


@settings(max_examples=300)
@given(
    arena=st.integers(0, 60),
    capacity=st.integers(0, 24),
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=6, max_size=6),
    steps=STEPS,
)
def test_adapters_and_kv_share_a_pool(
    arena: int, capacity: int, sizes: list[tuple[int, int]], steps: list[tuple[str, int, int]]
) -> None:
    """No page and no byte has two owners, nothing in use moves, and in the end all of it comes back."""
    pool = PageAllocator(capacity)
    own = {name: AdapterSize(*size) for name, size in zip(NAMES, sizes, strict=True)}
    cache = AdapterCache(own, arena, pool)
    tables = [PageTable() for _ in range(6)]
    users: Counter[str] = Counter()
    places: dict[str, list[int]] = {}
    for step, who, number in steps:
        name = NAMES[who]
        if step == "use":
            swaps = cache.swaps(name)
            evicted = cache.counts.evictions
            if cache.acquire(name):
                assert cache.fits(name)
                assert swaps or cache.counts.evictions == evicted
                users[name] += 1
                places.setdefault(name, list(cache.pages(name)))
            else:
                assert users[name] == 0
        elif step == "leave" and users[name]:
            cache.release(name)
            users[name] -= 1
            if not users[name]:
                del places[name]
        elif step == "grow":
            if not pool.grow(tables[who], number, number) and cache.reclaim():
                pool.grow(tables[who], number, number)
        elif step == "free":
            pool.release(tables[who])
        elif step == "fetch":
            cache.fetch(NAMES[who : who + number])
        elif step == "sweep":
            moves = cache.take_moves()
            for moved in (*moves.reads, *moves.fetches, *moves.uploads):
                cache.start(moved)
            held = {page for moved in moves.uploads for page in cache.pages(moved)}
            assert not held & set(moves.clears)
            cache.computed()
        kv = [page for table in tables for page in table.pages]
        adapters = [page for pages in places.values() for page in pages]
        assert len(set(kv + adapters)) == len(kv) + len(adapters)
        assert all(cache.pages(known) == pages for known, pages in places.items())
        assert len(kv) + len(adapters) <= pool.used <= capacity
        assert cache.pinned_pages == len(adapters)
    for name, count in users.items():
        for _ in range(count):
            cache.release(name)
    cache.clear()
    for table in tables:
        pool.release(table)
    pool.check_idle()
    for name in NAMES:
        if cache.fits(name):
            assert cache.acquire(name), "an empty pool takes whatever fits it"
            cache.take_moves()
            cache.computed()
            cache.release(name)


def test_the_least_recently_used_goes_first() -> None:
    cache = AdapterCache({name: AdapterSize(10) for name in NAMES}, 30)
    for name in NAMES[:3]:
        assert cache.acquire(name)
    assert cache.take_moves().reads == ("a0", "a1", "a2")
    assert not cache.acquire("a3")
    assert cache.counts.waits == 1
    for name in ("a1", "a0", "a2"):
        cache.release(name)
    assert cache.acquire("a0")
    cache.release("a0")
    assert cache.acquire("a3")
    assert cache.acquire("a0"), "still there"
    assert cache.take_moves().reads == ("a3",)
    assert cache.acquire("a1")
    assert cache.take_moves().reads == ("a1",)
    with pytest.raises(InternalError, match="3 adapters are still in use"):
        cache.check_idle()
    with pytest.raises(InternalError, match="not in use"):
        cache.release("a5")


@settings(max_examples=300)
@given(
    arena=st.integers(1, 60),
    lengths=st.lists(st.integers(1, 30), min_size=6, max_size=6),
    runs=st.lists(st.tuples(st.sets(st.sampled_from(NAMES)), st.randoms(use_true_random=False)), max_size=6),
)
def test_runs_whose_adapters_fit_the_arena_never_wait(
    arena: int, lengths: list[int], runs: list[tuple[set[str], random.Random]]
) -> None:
    """Whatever earlier runs left where; and what is used has been read since it got its place."""
    sizes = dict(zip(NAMES, lengths, strict=True))
    cache = AdapterCache({name: AdapterSize(length) for name, length in sizes.items()}, arena)
    there: dict[str, int] = {}
    for names, rng in runs:
        cache.expect(names)
        order = sorted(names)
        rng.shuffle(order)
        used: list[str] = []
        for name in order:
            before = set(used)
            if rng.random() < 0.3:
                cache.fetch(order)
            if rng.random() < 0.2:
                continue  # its row is cancelled
            if cache.acquire(name):
                used.append(name)
            else:
                assert sum(sizes[name] for name in names) > arena
            moves = cache.take_moves()
            for read in (*moves.reads, *moves.fetches):
                start, stop = cache.start(read), cache.start(read) + sizes[read]
                assert stop <= arena
                over = [old for old, at in there.items() if at < stop and start < at + sizes[old]]
                assert not {read, *over} & before, "something in use was overwritten"
                there = {old: at for old, at in there.items() if old not in over} | {read: start}
            assert all(there[name] == cache.start(name) for name in used)
            cache.computed()
        for name in used:
            cache.release(name)
    cache.clear()
    assert cache.fragmentation == 0


def test_what_lies_between_pieces_of_room_goes() -> None:
    """Two adapters of an earlier run leave no room of 20, though 20 are free: a run with the three begins empty."""
    sizes = {"a0": AdapterSize(10), "a1": AdapterSize(10), "a2": AdapterSize(10), "a3": AdapterSize(20)}
    cache = AdapterCache(sizes, 40)
    for name in ("a0", "a1", "a2"):
        cache.acquire(name)
    cache.take_moves()
    for name in ("a0", "a1", "a2"):
        cache.release(name)
    cache.drop("a1")
    cache.expect(["a0", "a2", "a3"])
    assert cache.acquire("a3")
    assert cache.acquire("a0")
    assert cache.acquire("a2")
    assert sorted(cache.take_moves().reads) == ["a0", "a2", "a3"]


def test_what_comes_next_is_fetched_but_pushes_nothing_needed_out() -> None:
    cache = AdapterCache({name: AdapterSize(10) for name in NAMES}, 30)
    cache.acquire("a0")
    cache.take_moves()
    cache.fetch(["a1", "a2", "a3", "a1"])
    assert cache.take_moves().fetches == ("a1", "a2")
    cache.fetch(["a4", "a2"])
    assert cache.take_moves().fetches == ("a4",)
    assert cache.acquire("a2")
    assert cache.take_moves().reads == ()


def row(number: int, prompt: int, new: int, adapter: str | None) -> Sequence:
    request = Request(str(number), SamplingParams(max_tokens=new), prompt=(1,) * prompt, lora=adapter)
    return Sequence.of(TokenizedRequest(request, number, (1,) * prompt), 10_000)


def drain(scheduler: Scheduler, sequences: list[Sequence]) -> list[list[str | None]]:
    """Run everything; the adapters of each sweep's rows."""
    seen = []
    while (sweep := scheduler.next_sweep()) is not None:
        seen.append(sorted({piece.sequence.adapter or "" for piece in sweep.slices}))
        scheduler.computed(sweep)
        for piece in sweep.slices:
            sequence = piece.sequence
            if piece.samples:
                sequence.tokens.append(1)
                if len(sequence.tokens) >= sequence.limit:
                    scheduler.retire(sequence)
        assert len(seen) < 3000, "somebody waits for ever"
    assert all(len(sequence.tokens) == sequence.limit for sequence in sequences)
    return [list(names) for names in seen]


@pytest.mark.parametrize("schedule", ["continuous", "block"])
@pytest.mark.parametrize("seed", range(12))
def test_every_row_ends_in_any_pool(seed: int, schedule: Schedule) -> None:
    rng = random.Random(seed)
    pages = rng.randint(14, 40)
    pools = {tier: PageAllocator(pages) for tier in rng.choice([("gpu",), ("gpu", "cpu"), ("cpu",)])}
    own = pools.get("gpu") or PageAllocator(12)
    sizes = {name: AdapterSize(rng.randint(1, 10), rng.randint(1, 6)) for name in NAMES}
    cache = AdapterCache(sizes, rng.randint(10, 40), own)
    plan = small_plan(schedule=schedule, kv_pages=dict.fromkeys(pools, pages))
    scheduler = Scheduler(plan, pools, adapters=cache, expected_fraction=rng.choice([0.0, 1.0]))
    rows = [row(i, rng.randint(1, 14), rng.randint(1, 14), rng.choice([*NAMES, None])) for i in range(40)]
    scheduler.add(rows)
    drain(scheduler, rows)
    cache.clear()
    for pool in pools.values():
        pool.check_idle()


def test_rows_are_grouped_by_adapter_where_that_saves_swaps() -> None:
    def reads(adapters: list[str], arena: int) -> int:
        cache = AdapterCache({name: AdapterSize(1) for name in NAMES}, arena)
        scheduler = Scheduler(small_plan(), {"cpu": PageAllocator(64)}, adapters=cache)
        rows = [row(i, 3, 4, name) for i, name in enumerate(adapters)]
        scheduler.add(rows)
        drain(scheduler, rows)
        return cache.counts.reads

    adapters = [NAMES[i % 6] for i in range(48)]
    assert reads(adapters, 6) == 6
    assert reads(adapters, 2) <= 12, "in the rows' own order it would be 48"
    assert reads(adapters, 1) <= 12


def test_rows_of_one_adapter_lie_side_by_side_in_a_micro_batch() -> None:
    cache = AdapterCache({name: AdapterSize(1) for name in NAMES}, 6)
    plan = replace(small_plan(), max_sequences=40, micro_batch_tokens=30)
    scheduler = Scheduler(plan, {"cpu": PageAllocator(64)}, adapters=cache)
    adapters = [None if i % 7 == 6 else NAMES[i % 7 % 3] for i in range(40)]
    scheduler.add([row(i, 3, 4, name) for i, name in enumerate(adapters)])
    sweep = scheduler.next_sweep()
    assert sweep is not None
    assert len(sweep.micro_batches) > 1
    for batch in sweep.micro_batches:
        rows = AdapterRows.of(batch)
        assert rows is not None
        names = [piece.sequence.adapter for piece in batch.slices]
        assert len(rows.spans) == len(rows.names) == len(set(names) - {None})
        for first, count, place in rows.spans:
            pieces = [piece for piece in batch.slices for _ in range(piece.count)][first : first + count]
            assert {piece.sequence.adapter for piece in pieces} == {rows.names[place]}
            assert count == sum(piece.count for piece in batch.slices if piece.sequence.adapter == rows.names[place])


def test_no_row_is_passed_for_ever() -> None:
    cache = AdapterCache({name: AdapterSize(1) for name in NAMES}, 1)
    scheduler = Scheduler(replace(small_plan(), max_sequences=2), {"cpu": PageAllocator(64)}, adapters=cache)
    rows = [row(0, 3, 4, "a0"), row(1, 3, 4, "a1"), *(row(i, 3, 4, "a0") for i in range(2, 300))]
    scheduler.add(rows)
    seen = drain(scheduler, rows)
    first = next(place for place, names in enumerate(seen) if names == ["a1"])
    assert first < len(seen) / 2


def test_the_rows_of_a_lost_adapter_leave() -> None:
    cache = AdapterCache({name: AdapterSize(10, 2) for name in NAMES}, 20, PageAllocator(8))
    scheduler = Scheduler(small_plan(), {"cpu": PageAllocator(64)}, adapters=cache)
    rows = [row(i, 3, 4, NAMES[i % 2]) for i in range(20)]
    scheduler.add(rows)
    sweep = scheduler.next_sweep()
    assert sweep is not None
    scheduler.computed(sweep)
    lost = scheduler.drop("a0")
    assert {sequence.source.index for sequence in lost} == set(range(0, 20, 2))
    kept = [sequence for sequence in rows if sequence.adapter == "a1"]
    for piece in sweep.slices:
        if piece.samples:
            piece.sequence.tokens.append(1)
    drain(scheduler, kept)
    cache.clear()
