"""Shared prefixes without a model: the tree against brute force; runs in which every page holds what it should."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence as SequenceOf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.requests import Request, TokenizedRequest
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.pages import PageAllocator, PageTable
from flexbatch.scheduler.prefix_cache import PrefixCache
from flexbatch.scheduler.prefixes import PrefixTree
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.sweep import Sweep
from tests.plans import small_plan

PAGE = 4
Prompt = tuple[int, ...]


def random_prompts(rng: random.Random, count: int, vocab: int = 2, longest: int = 40) -> list[Prompt]:
    """Prompts that branch off one another anywhere, some of them equal, some within others."""
    prompts: list[Prompt] = []
    for _ in range(count):
        stem = rng.choice(prompts)[: rng.randint(0, longest)] if prompts and rng.random() < 0.8 else ()
        tail = tuple(rng.randrange(vocab) for _ in range(rng.randint(0, longest - len(stem))))
        prompts.append((stem + tail) or (0,))
    return prompts


def requests_of(prompts: list[Prompt], adapters: SequenceOf[str | None]) -> list[TokenizedRequest]:
    return [
        TokenizedRequest(Request(str(index), SamplingParams(), prompt, lora=lora), index, prompt)
        for index, (prompt, lora) in enumerate(zip(prompts, adapters, strict=True))
    ]


def alike(first: Prompt, second: Prompt) -> int:
    """Whole pages that two prompts share, the last token of neither among them."""
    most = min(len(first), len(second)) - 1
    common = next((i for i in range(most) if first[i] != second[i]), most)
    return common // PAGE


@given(seed=st.integers(0, 10**6), count=st.integers(1, 25), kinds=st.integers(1, 2), vocab=st.integers(1, 3))
def test_the_tree_is_what_comparing_all_pairs_gives(seed: int, count: int, kinds: int, vocab: int) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(rng, count, vocab)
    kind = [rng.choice([None, "a"][:kinds]) for _ in prompts]
    tree = PrefixTree.of(requests_of(prompts, kind), PAGE)
    pairs = {
        (i, j): alike(prompts[i], prompts[j]) if kind[i] == kind[j] else 0
        for i in range(count)
        for j in range(count)
        if i != j
    }
    for i, leaf in enumerate(tree.leaves):
        depths = sorted({pairs[i, j] for j in range(count) if i != j} - {0})
        path = leaf.path if leaf is not None else ()
        assert (path[-1].stop if path else 0) == max(depths, default=0)
        assert [prefix.start for prefix in path] == [0, *(prefix.stop for prefix in path)][: len(path)]
        for prefix in path:
            sharers = {j for j in range(count) if j == i or pairs[i, j] >= prefix.stop}
            assert prefix.rows == len(sharers)
            assert all(prefix in (tree.leaves[j] or prefix).path or tree.leaves[j] is None for j in sharers)
    for (i, j), pages in pairs.items():
        first, second = tree.leaves[i], tree.leaves[j]
        common = set(first.path) & set(second.path) if first is not None and second is not None else set()
        assert max((prefix.stop for prefix in common), default=0) == pages
    computed: set[tuple[str | None, Prompt]] = set()
    for i, pages in enumerate(tree.shared_pages()):
        assert pages == max((pairs[i, j] for j in range(i)), default=0)
        computed |= {(kind[i], prompts[i][: at * PAGE]) for at in range(1, (len(prompts[i]) - 1) // PAGE + 1)}
    own = sum((len(prompt) - 1) // PAGE for prompt in prompts)
    assert own - sum(tree.shared_pages()) == len(computed)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 25))
def test_the_order_keeps_sharers_together_and_the_longest_first(seed: int, count: int) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(rng, count)
    lengths = [rng.randint(0, 9) for _ in prompts]
    tree = PrefixTree.of(requests_of(prompts, [None] * count), PAGE)
    order = tree.order(lengths)
    assert sorted(order) == list(range(count))
    for leaf in tree.leaves:
        for prefix in leaf.path if leaf is not None else ():
            places = [place for place, row in enumerate(order) if prefix in getattr(tree.leaves[row], "path", ())]
            assert places == list(range(places[0], places[0] + prefix.rows))
    tops = [leaf.path[0] if leaf is not None else row for row, leaf in enumerate(tree.leaves)]
    longest: dict[object, int] = {}
    for row, top in enumerate(tops):
        longest[top] = max(longest.get(top, 0), lengths[row])
    ranks = [longest[tops[row]] for row in order]
    assert ranks == sorted(ranks, reverse=True)


def make(prompts: list[Prompt], rng: random.Random, adapters: int = 0) -> list[Sequence]:
    made = []
    for index, prompt in enumerate(prompts):
        scoring = len(prompt) > 1 and rng.random() < 0.4
        params = SamplingParams(
            max_tokens=rng.choice([0, 3]) if scoring else rng.randint(1, 12),
            echo=scoring,
            logprobs=rng.randint(0, 2) if scoring else None,
        )
        lora = rng.choice([None, "a", "b"][: adapters + 1])
        made.append(Sequence.of(TokenizedRequest(Request(str(index), params, prompt, lora=lora), index, prompt), 64))
    return made


class Memory:
    """What pages hold: for every page of every tier and offset the tokens up to there, as a run would have computed."""

    def __init__(self, tiers: list[str]) -> None:
        self.held: dict[tuple[str, int, int], tuple[str | None, Prompt]] = {}
        self.computed = 0

    def run(self, sweep: Sweep) -> None:
        for piece in sweep.slices:
            sequence = piece.sequence
            for position in range(piece.start):
                assert self.held[self._place(sequence, position)] == self._history(sequence, position)
            for position in range(piece.start, piece.stop):
                self.held[self._place(sequence, position)] = self._history(sequence, position)
            self.computed += piece.count

    @staticmethod
    def _place(sequence: Sequence, position: int) -> tuple[str, int, int]:
        return sequence.tier, sequence.pages.pages[position // PAGE], position % PAGE

    @staticmethod
    def _history(sequence: Sequence, position: int) -> tuple[str | None, Prompt]:
        return sequence.adapter, tuple(sequence.tokens[: position + 1])


def value(sequence: Sequence, position: int, token: int) -> float:
    """A log-probability that tells the adapter, all tokens before and the token itself."""
    return float(hash((sequence.adapter, tuple(sequence.tokens[: position + 1]), token)) % 10**9)


def drive(scheduler: Scheduler, memory: Memory, sweeps: int | None = None) -> None:
    """Run to the end (or some sweeps) with an imagined model; check every page that is read and every score."""
    for _ in range(4000 if sweeps is None else sweeps):
        sweep = scheduler.next_sweep()
        if sweep is None:
            return
        again = scheduler.continues
        memory.run(sweep)
        scheduler.computed(sweep)
        for piece in sweep.slices:
            sequence = piece.sequence
            positions = range(piece.score_from, piece.score_to)
            if positions:
                values = [value(sequence, at, sequence.tokens[at + 1]) for at in positions]
                top = [{k: value(sequence, at, k) for k in range(sequence.prompt_top)} for at in positions]
                branches = {
                    at: {token: value(sequence, at, token) for token in sequence.branches[at]}
                    for at in positions
                    if at in sequence.branches
                }
                scheduler.scored(piece, values, top, branches)
            if piece.stop == sequence.computed and sequence.pending == 0:
                if sequence.wants_tokens:
                    sequence.tokens.append(len(sequence.tokens) % 3)
                if len(sequence.tokens) >= sequence.limit and sequence.finish_reason is None:
                    sequence.finish_reason = "length"
                    scheduler.retire(sequence)
        assert again or scheduler.next_sweep() is None
    assert sweeps is not None, "the run does not end"


def check_scores(sequences: list[Sequence], begun: dict[Sequence, int] | None = None) -> None:
    for sequence in sequences:
        assert sequence.finish_reason == "length"
        first = (begun or {}).get(sequence, 0)
        expected = range(first, sequence.prompt_len - 1) if sequence.scores_prompt else range(0)
        assert sequence.prompt_logprobs.values == [value(sequence, at, sequence.tokens[at + 1]) for at in expected]
        most = sequence.source.request.params.logprobs or 0
        assert sequence.prompt_logprobs.top == [{k: value(sequence, at, k) for k in range(most)} for at in expected]


@pytest.mark.parametrize("tiers", [["cpu"], ["gpu", "cpu", "disk"]])
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 25),
    pages=st.integers(14, 40),
    budget=st.integers(1, 60),
    most=st.integers(1, 12),
    fraction=st.sampled_from([0.0, 0.3, 1.0]),
    adapters=st.integers(0, 2),
)
def test_every_page_holds_what_its_rows_expect_and_nothing_leaks(
    tiers: list[str], seed: int, count: int, pages: int, budget: int, most: int, fraction: float, adapters: int
) -> None:
    rng = random.Random(seed)
    batch = make(random_prompts(rng, count), rng, adapters)
    begun = {sequence: rng.choice([0, rng.randrange(sequence.prompt_len)]) for sequence in batch}
    for sequence, first in begun.items():
        sequence.scored = first + 1  # only what follows from there on is wanted
    counts = dict.fromkeys(tiers, pages)
    plan = small_plan(
        max_sequences=most, prompt_tokens_per_sweep=budget, kv_pages=counts, micro_batch_tokens=rng.randint(1, 30)
    )
    pools = {tier: PageAllocator(number) for tier, number in counts.items()}
    cache = PrefixCache(pools, PAGE)
    scheduler = Scheduler(plan, pools, expected_fraction=fraction, prefixes=cache)
    scheduler.add(batch)
    drive(scheduler, Memory(tiers))
    check_scores(batch, begun)
    assert cache.parked == 0
    for tier, pool in pools.items():
        pool.check_idle()
        assert cache.pinned_pages(tier) == 0
    for sequence in batch:
        assert all(prefix.waiting == 0 and prefix.scores is None for prefix in sequence.prefixes)


@given(seed=st.integers(0, 10**6), when=st.integers(0, 6))
def test_an_adapter_that_is_dropped_takes_its_prefixes_along(seed: int, when: int) -> None:
    rng = random.Random(seed)
    batch = make(random_prompts(rng, 20), rng, adapters=2)
    pools = {"cpu": PageAllocator(30)}
    plan = small_plan(max_sequences=6, prompt_tokens_per_sweep=rng.randint(5, 40), kv_pages={"cpu": 30})
    cache = PrefixCache(pools, PAGE)
    scheduler = Scheduler(plan, pools, prefixes=cache)
    scheduler.add(batch)
    memory = Memory(["cpu"])
    drive(scheduler, memory, sweeps=when)
    dropped = scheduler.drop("a")
    left = [sequence for sequence in batch if sequence.adapter == "a" and sequence.finish_reason is None]
    assert sorted(map(id, dropped)) == sorted(map(id, left))
    drive(scheduler, memory)
    check_scores([sequence for sequence in batch if sequence not in dropped])
    assert cache.parked == 0
    pools["cpu"].check_idle()


@given(seed=st.integers(0, 10**6), pages=st.integers(14, 40))
def test_expected_lengths_of_one_never_preempt(seed: int, pages: int) -> None:
    rng = random.Random(seed)
    batch = make(random_prompts(rng, 25), rng)
    pools = {"cpu": PageAllocator(pages)}
    plan = small_plan(max_sequences=100, prompt_tokens_per_sweep=100, kv_pages={"cpu": pages})
    scheduler = Scheduler(plan, pools, prefixes=PrefixCache(pools, PAGE))
    scheduler.add(batch)
    drive(scheduler, Memory(["cpu"]))
    assert scheduler.preemptions == 0


def test_with_room_every_shared_token_is_computed_once() -> None:
    rng = random.Random(1)
    prompts = random_prompts(rng, 40)
    batch = make(prompts, rng)
    pools = {"cpu": PageAllocator(4000)}
    cache = PrefixCache(pools, PAGE)
    plan = small_plan(max_sequences=100, prompt_tokens_per_sweep=50, kv_pages={"cpu": 4000})
    scheduler = Scheduler(plan, pools, prefixes=cache)
    scheduler.add(batch)
    memory = Memory(["cpu"])
    drive(scheduler, memory)
    shared = PAGE * sum(PrefixTree.of([sequence.source for sequence in batch], PAGE).shared_pages())
    assert shared > 200
    assert cache.counts.tokens == shared
    assert cache.counts.evictions == 0
    fed_back = sum(
        len(sequence.generated) - 1 for sequence in batch
    )  # of a scored prompt the last token is not computed
    assert memory.computed == sum(map(len, prompts)) - shared + fed_back


def test_a_prefix_saves_the_pages_of_all_rows_but_one() -> None:
    prompts = [(*range(20), index, index) for index in range(10)]
    batch = [
        Sequence.of(TokenizedRequest(Request(str(i), SamplingParams(max_tokens=8), p), i, p), 64)
        for i, p in enumerate(prompts)
    ]
    used: dict[bool, int] = {}
    for shares in (False, True):
        pools = {"cpu": PageAllocator(100)}
        cache = PrefixCache(pools, PAGE) if shares else None
        plan = small_plan(max_sequences=10, prompt_tokens_per_sweep=300, kv_pages={"cpu": 100})
        scheduler = Scheduler(plan, pools, prefixes=cache)
        scheduler.add(batch if shares else [Sequence.of(row.source, 64) for row in batch])
        used[shares] = 0
        while (sweep := scheduler.next_sweep()) is not None:
            used[shares] = max(used[shares], pools["cpu"].used)
            scheduler.computed(sweep)
            for piece in sweep.slices:
                piece.sequence.tokens.append(0)
                if len(piece.sequence.tokens) >= piece.sequence.limit:
                    scheduler.retire(piece.sequence)
        if cache is not None:
            assert cache.counts.peak == 9 * 5
    assert used[False] - used[True] >= 40


def test_a_row_that_does_not_share_is_not_held_up_by_those_that_do() -> None:
    rows = [(*range(40), index) for index in range(30)]
    rows.insert(15, (7,) * 9)
    batch = [
        Sequence.of(TokenizedRequest(Request(str(i), SamplingParams(max_tokens=2), p), i, p), 64)
        for i, p in enumerate(rows)
    ]
    pools = {"cpu": PageAllocator(100)}
    plan = small_plan(max_sequences=40, prompt_tokens_per_sweep=60, kv_pages={"cpu": 100})
    scheduler = Scheduler(plan, pools, prefixes=PrefixCache(pools, PAGE))
    scheduler.add(batch)
    sweep = scheduler.next_sweep()
    assert sweep is not None
    assert Counter(piece.sequence.source.index for piece in sweep.slices).keys() == {0, 15}


def test_a_prefix_between_two_users_gives_way_to_a_row_that_runs_and_is_computed_again() -> None:
    params = SamplingParams(max_tokens=0, echo=True, logprobs=1)
    prompts = [(*range(16), index, index) for index in range(60)]
    rows = [TokenizedRequest(Request(str(i), params, p), i, p) for i, p in enumerate(prompts)]
    rows.append(TokenizedRequest(Request("long", SamplingParams(max_tokens=34), (9, 9)), 60, (9, 9)))
    batch = [Sequence.of(row, 64) for row in rows]
    pools = {"cpu": PageAllocator(10)}
    cache = PrefixCache(pools, PAGE)
    plan = small_plan(max_sequences=2, prompt_tokens_per_sweep=30, kv_pages={"cpu": 10})
    scheduler = Scheduler(plan, pools, expected_fraction=0.0, prefixes=cache)
    scheduler.add(batch)
    drive(scheduler, Memory(["cpu"]))
    check_scores(batch)
    assert cache.counts.evictions > 0
    assert batch[60].preemptions == 0
    pools["cpu"].check_idle()


def test_sharing_leaves_room_for_growth_in_one_run() -> None:
    pool = PageAllocator(20)
    holder, first, second = PageTable(), PageTable(), PageTable()
    pool.grow(holder, 3, 3)
    for table in (first, second):
        pool.share(table, holder.pages)
        pool.grow(table, 4, 7)
    for pages in range(5, 8):
        pool.grow(first, pages, 7)
        pool.grow(second, pages, 7)
    assert first.pages == [0, 1, 2, 3, 4, 5, 6]
    assert second.pages == [0, 1, 2, 7, 8, 9, 10]
    for table in (holder, first, second):
        pool.release(table)
    pool.check_idle()
