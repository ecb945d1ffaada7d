"""Decides what the next sweep computes: admission, refill, chunked prefill, preemption. Pure: no tensors, no clock.

Every decision depends on token counts alone, so a serial and an overlapped run make the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from flexbatch.errors import InternalError
from flexbatch.scheduler.adapters import AdapterCache
from flexbatch.scheduler.pages import PageAllocator
from flexbatch.scheduler.prefix_cache import PrefixCache
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.spread import Spread
from flexbatch.scheduler.sweep import (
    MicroBatch,
    Slice,
    Sweep,
    by_adapter,
    cut,
    pack_by_sequences,
    pack_by_tokens,
    part_by_attention,
)

if TYPE_CHECKING:
    from flexbatch.policy.plan import Plan

_SAFETY = 1.25  # expected lengths are stretched by this before they are trusted
_MEMORY = 32  # finished rows over which the expected length is averaged
_LOOKAHEAD = 64  # waiting rows among which one is looked for whose adapter is at hand, and whose adapters are fetched
_PATIENCE = 64  # rows that may be let pass the first one for that


class Scheduler:
    """Continuous or fixed-block scheduling of sequences over the pools of pages of all tiers.

    A sequence's KV has one home tier, chosen at admission: the one that is filled least.

    ``expected_fraction`` is the share of its ``limit`` that a sequence is believed to reach; it starts at 1 (never
    preempt) and follows what finished rows did. Lengths believed too short end in preemption, not in failure.

    ``adapters`` keeps the adapters of running sequences at hand, where there are any; on a GPU in pages of the same
    pool. Rows whose adapter is at hand may pass a few whose adapter would push another one out.

    ``prefixes``: what prompts share, computed once; not in a fixed block, which stays FlexGen's.
    """

    def __init__(
        self,
        plan: Plan,
        pages: Mapping[str, PageAllocator],
        *,
        expected_fraction: float = 1.0,
        adapters: AdapterCache | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self._plan = plan
        self._pages = pages
        self._adapters = adapters
        self._prefixes = prefixes if plan.schedule == "continuous" else None
        self._passed = 0
        self._hidden = Spread(plan.hidden)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._fraction = expected_fraction
        self._sweeps = 0
        self._admitted = 0
        self.preemptions = 0

    @property
    def running(self) -> int:
        """Sequences in flight."""
        return len(self._running)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences, first come, first served. Each must fit the pool alone (see ``fits``).

        Where prefixes are shared, all of a run come at once, and in the order that makes most of it.
        """
        queued = list(sequences)
        for sequence in queued:
            if not self.fits(sequence):
                raise InternalError(f"row {sequence.source.request.id} can never fit the KV pool")
        self._waiting.extend(queued if self._prefixes is None else self._prefixes.begin(queued))

    def fits(self, sequence: Sequence) -> bool:
        """Whether some tier's whole pool could hold the sequence at its longest, and its adapter."""
        if self._adapters is not None and sequence.adapter is not None and not self._adapters.fits(sequence.adapter):
            return False
        needed = self._pages_for(sequence.cached_limit)
        return any(needed <= self._room_alone(tier, sequence) for tier in self._pages)

    def next_sweep(self) -> Sweep | None:
        """What to compute next, or None when nothing is left. Pages for it are allocated."""
        slices = self._block_slices() if self._plan.schedule == "block" else self._continuous_slices()
        if not slices:
            if self._running or self._waiting or self._parked:
                raise InternalError(f"{len(self._running)} sequences run and none can go on")
            return None
        self._sweeps += 1
        batches = tuple(self._pack(slices))
        if self._adapters is None:
            return Sweep(self._sweeps, batches)
        soon = (sequence.adapter for sequence in islice(self._waiting, _LOOKAHEAD))
        self._adapters.fetch(name for name in soon if name is not None)
        return Sweep(self._sweeps, batches, self._adapters.take_moves())

    @property
    def continues(self) -> bool:
        """Whether, as far as lengths tell, another sweep follows the one just given out."""
        return bool(self._waiting or self._parked) or any(
            sequence.pending > 1 or len(sequence.tokens) + 1 < sequence.limit for sequence in self._running
        )

    def computed(self, sweep: Sweep) -> None:
        """Note that the KV of the sweep's tokens is stored."""
        for piece in sweep.slices:
            piece.sequence.computed = piece.stop
            if self._prefixes is not None:
                self._resume(self._prefixes.computed(piece.sequence))
        if self._adapters is not None:
            self._adapters.computed()

    def scored(
        self,
        piece: Slice,
        values: list[float],
        top: list[dict[int, float]],
        branches: Mapping[int, Mapping[int, float]],
    ) -> None:
        """Give a slice's sequence, and those who share them, the log-probabilities behind positions ``score_from ..``.

        ``branches``: by position, those of tokens that follow there in other prompts.
        """
        piece.sequence.note_scores(piece.score_from, values, top)
        if self._prefixes is not None:
            self._prefixes.record(piece, values, top, branches)

    def drop(self, adapter: str) -> list[Sequence]:
        """Take out all sequences of an adapter that cannot be read, and return them."""
        running = [sequence for sequence in self._running if sequence.adapter == adapter]
        for sequence in running:
            self._leave(sequence)
        if self._prefixes is not None:
            for sequence in self._waiting:
                if sequence.adapter == adapter:
                    self._prefixes.forget(sequence)
        waiting = [sequence for sequence in self._waiting if sequence.adapter == adapter]
        self._waiting = deque(sequence for sequence in self._waiting if sequence.adapter != adapter)
        if self._adapters is not None:
            self._adapters.drop(adapter)
        return running + waiting

    def retire(self, sequence: Sequence) -> None:
        """A sequence is finished: its place and pages are free."""
        self._leave(sequence)
        room = sequence.limit - sequence.prompt_len
        if room > 0:
            reached = min(1.0, _SAFETY * len(sequence.generated) / room)
            self._fraction += (reached - self._fraction) / _MEMORY

    # --- one sweep ---------------------------------------------------------------------------------------------

    def _pack(self, slices: list[Slice]) -> Iterator[MicroBatch]:
        for tier in self._pages:
            at_home = [piece for piece in slices if piece.sequence.tier == tier]
            for part, streamed in part_by_attention(at_home, tier, self._plan.gpu_attention):
                for pieces in self._pack_part(part, tier, streamed):
                    tokens = sum(piece.count for piece in pieces)
                    yield MicroBatch(by_adapter(pieces), tier, self._hidden.choose(tokens), streamed)

    def _pack_part(self, slices: list[Slice], tier: str, streamed: bool) -> list[tuple[Slice, ...]]:
        plan = self._plan
        staged = streamed or tier == "disk" or plan.gpu_attention is None
        pages = plan.staged_pages.get(tier) if staged else None
        if plan.schedule == "block":
            return pack_by_sequences(slices, plan.micro_batch_sequences)
        return pack_by_tokens(slices, plan.micro_batch_tokens, pages or self._pages[tier].capacity, plan.page_tokens)

    def _continuous_slices(self) -> list[Slice]:
        slices = self._decode_slices()
        budget = self._plan.prompt_tokens_per_sweep
        for sequence in list(self._running):
            if budget > 0 and sequence in self._running and not sequence.is_decoding:
                budget -= self._prefill(sequence, budget, slices)
        while budget > 0 and len(self._running) < self._plan.max_sequences:
            found = self._next_admission()
            if found is None:
                break
            computing = self._prefill(self._admit(*found), budget, slices)
            if computing == 0:
                break
            budget -= computing
        return slices

    def _block_slices(self) -> list[Slice]:
        """FlexGen's fixed block: a new one starts when the last is finished, sized by its longest lengths."""
        if not self._running:
            left = {tier: pool.capacity for tier, pool in self._pages.items()}
            while self._waiting and len(self._running) < self._plan.max_sequences:
                home = max(left, key=lambda tier: left[tier] / max(1, self._pages[tier].capacity))
                first = self._waiting[0]
                left[home] -= self._pages_for(first.cached_limit)
                if "gpu" in left and self._adapters is not None and not self._adapters.is_pinned(first.adapter):
                    left["gpu"] -= self._adapters.pages_of(first.adapter)
                if min(left.values()) < 0 or not self._acquire(first):
                    break
                self._admit(home)
        slices = self._decode_slices()
        budget = self._plan.prompt_tokens_per_sweep
        for sequence in self._running:
            if budget > 0 and not sequence.is_decoding:
                budget -= self._prefill(sequence, budget, slices)
        return slices

    def _decode_slices(self) -> list[Slice]:
        slices: list[Slice] = []
        for sequence in list(self._running):
            if sequence.age < 0 or not sequence.is_decoding:
                continue  # preempted by an older one in this very loop, or still at its prompt
            if self._make_room(sequence, len(sequence.tokens)):
                slices.append(cut(sequence, 1))
        return slices

    def _prefill(self, sequence: Sequence, budget: int, slices: list[Slice]) -> int:
        count = min(sequence.pending, budget)
        planned = {piece.sequence.age for piece in slices}
        if not self._make_room(sequence, sequence.computed + count, spare=planned):
            return 0
        slices.append(cut(sequence, count))
        return count

    def _make_room(self, sequence: Sequence, tokens: int, spare: set[int] | None = None) -> bool:
        """Allocate pages up to ``tokens``, preempting the youngest; False if the sequence itself had to go or wait."""
        needed = self._pages_for(tokens)
        expected = self._pages_for(self._expected_tokens(sequence))
        while not self._pages[sequence.tier].grow(sequence.pages, needed, expected):
            if sequence.tier == "gpu" and self._adapters is not None and self._adapters.reclaim():
                continue
            if self._prefixes is not None and self._prefixes.evict(sequence.tier):
                continue
            at_home = [other for other in self._running if other.tier == sequence.tier]
            youngest = max(at_home, key=lambda other: other.age)
            if spare is not None and (youngest is sequence or youngest.age in spare):
                return False  # a prompt waits for the next sweep rather than undo work of this one
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _leave(self, sequence: Sequence, *, again: bool = False) -> None:
        self._running.remove(sequence)
        if self._prefixes is not None:
            self._resume(self._prefixes.leave(sequence, again=again))
        self._pages[sequence.tier].release(sequence.pages)
        if self._adapters is not None and sequence.adapter is not None:
            self._adapters.release(sequence.adapter)

    def _resume(self, sequences: list[Sequence]) -> None:
        """Rows that were held back for the sake of a prefix are next."""
        self._waiting.extendleft(sorted(sequences, key=lambda sequence: sequence.turn, reverse=True))

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence, again=True)
        sequence.computed = 0
        sequence.age = -1
        sequence.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(sequence)

    # --- admission ---------------------------------------------------------------------------------------------

    @property
    def _parked(self) -> int:
        """Rows held back until another has computed what they share."""
        return 0 if self._prefixes is None else self._prefixes.parked

    def _next_admission(self) -> tuple[str, int] | None:
        """The next row to admit: its home and its place among those waiting; None: none for now."""
        while self._waiting:
            place = self._next_place()
            candidate = self._waiting[place]
            if self._prefixes is not None and self._prefixes.park(candidate, self._pages):
                del self._waiting[place]
                continue
            home = self._home_for(candidate)
            if home is None:
                return None
            if self._prefixes is not None and self._prefixes.park(candidate, (home,)):
                del self._waiting[place]
                continue
            return (home, place) if self._acquire(candidate) else None
        return None

    def _next_place(self) -> int:
        """The place of the waiting row to admit next: the first, unless its adapter would push another one out.

        Then one further back may go first, whose adapter is at hand; but the first lets only so many pass.
        """
        adapters = self._adapters
        if adapters is None or self._passed >= _PATIENCE or not adapters.swaps(self._waiting[0].adapter):
            return 0
        ahead = enumerate(islice(self._waiting, _LOOKAHEAD))
        return next((place for place, sequence in ahead if not adapters.swaps(sequence.adapter)), 0)

    def _acquire(self, sequence: Sequence) -> bool:
        """Have the adapter of a sequence that is about to be admitted."""
        return self._adapters is None or sequence.adapter is None or self._adapters.acquire(sequence.adapter)

    def _admit(self, tier: str, place: int = 0) -> Sequence:
        sequence = self._waiting[place]
        del self._waiting[place]
        self._passed = self._passed + 1 if place else 0
        sequence.tier = tier
        sequence.age = self._admitted
        self._admitted += 1
        self._running.append(sequence)
        if self._prefixes is not None:
            self._prefixes.attach(sequence)
        return sequence

    def _home_for(self, candidate: Sequence) -> str | None:
        """The least filled tier that has room for the candidate until it ends, or None."""
        tokens = dict.fromkeys(self._pages, 0)
        for sequence in self._running:
            tokens[sequence.tier] += self._expected_tokens(sequence) - sequence.shared * self._plan.page_tokens
        tiers = [tier for tier, pool in self._pages.items() if pool.capacity]
        tiers.sort(key=lambda tier: tokens[tier] / self._pages[tier].capacity)
        if self._prefixes is not None and len(tiers) > 1:
            best = self._prefixes.home(candidate)
            tiers.sort(key=lambda tier: tier != best)
        return next((tier for tier in tiers if self._may_admit(candidate, tier)), None)

    def _may_admit(self, candidate: Sequence, tier: str) -> bool:
        """Whether ``tier`` holds all sequences at home there and the candidate at every moment until they end.

        Lengths are the expected ones; at the moment a sequence ends its pages are free for the others. With nothing
        running there the candidate is admitted if it fits alone.
        """
        at_home = [sequence for sequence in self._running if sequence.tier == tier]
        fits_alone = self._pages_for(candidate.cached_limit) <= self._room_alone(tier, candidate)
        capacity = self._pages[tier].capacity - self._adapter_pages(tier, candidate)
        if not at_home and capacity == self._room_alone(tier, candidate):
            return fits_alone
        shares = [sequence.shared for sequence in at_home]
        if self._prefixes is not None:
            capacity -= self._prefixes.pinned_pages(tier) + self._prefixes.idle_pages(candidate, tier)
        shares.append(self._prefixes.covered(candidate, tier) if self._prefixes is not None else 0)
        rows = list(zip((*at_home, candidate), shares, strict=True))
        at_most = sum(self._pages_for(self._expected_tokens(sequence)) - shared for sequence, shared in rows)
        if at_most <= capacity:
            return fits_alone
        ends = sorted(
            (
                self._expected_tokens(sequence) - len(sequence.tokens),
                len(sequence.tokens) - shared * self._plan.page_tokens,
            )
            for sequence, shared in rows
        )
        length = sum(tokens for _, tokens in ends)
        alive = len(ends)
        for sweeps_left, tokens in ends:
            # Each sequence alive has one page that is partly filled.
            if (length + sweeps_left * alive) // self._plan.page_tokens + alive > capacity:
                return False
            length -= tokens
            alive -= 1
        return fits_alone

    def _adapter_pages(self, tier: str, candidate: Sequence) -> int:
        """Pages of ``tier`` that adapters hold while the candidate runs beside all others."""
        if tier != "gpu" or self._adapters is None:
            return 0
        own = 0 if self._adapters.is_pinned(candidate.adapter) else self._adapters.pages_of(candidate.adapter)
        return self._adapters.pinned_pages + own

    def _room_alone(self, tier: str, candidate: Sequence) -> int:
        """Pages of ``tier`` for the candidate's KV if nothing else runs."""
        own = self._adapters.pages_of(candidate.adapter) if tier == "gpu" and self._adapters is not None else 0
        return self._pages[tier].capacity - own

    def _expected_tokens(self, sequence: Sequence) -> int:
        grown = sequence.prompt_len + round((sequence.limit - sequence.prompt_len) * min(1.0, self._fraction))
        return min(sequence.cached_limit, max(grown, len(sequence.tokens) + 1))

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._plan.page_tokens)
