"""Decides what the next sweep computes: admission, refill, chunked prefill, preemption. Pure: no tensors, no clock.

Every decision depends on token counts alone, so a serial and an overlapped run make the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from flexbatch.errors import InternalError
from flexbatch.scheduler.pages import PageAllocator
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.spread import Spread
from flexbatch.scheduler.sweep import (
    MicroBatch,
    Slice,
    Sweep,
    cut,
    pack_by_sequences,
    pack_by_tokens,
    part_by_attention,
)

if TYPE_CHECKING:
    from flexbatch.policy.plan import Plan

_SAFETY = 1.25  # expected lengths are stretched by this before they are trusted
_MEMORY = 32  # finished rows over which the expected length is averaged


class Scheduler:
    """Continuous or fixed-block scheduling of sequences over the pools of pages of all tiers.

    A sequence's KV has one home tier, chosen at admission: the one that is filled least.

    ``expected_fraction`` is the share of its ``limit`` that a sequence is believed to reach; it starts at 1 (never
    preempt) and follows what finished rows did. Lengths believed too short end in preemption, not in failure.
    """

    def __init__(self, plan: Plan, pages: Mapping[str, PageAllocator], *, expected_fraction: float = 1.0) -> None:
        self._plan = plan
        self._pages = pages
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
        """Queue sequences, first come, first served. Each must fit the pool alone (see ``fits``)."""
        for sequence in sequences:
            if not self.fits(sequence):
                raise InternalError(f"row {sequence.source.request.id} can never fit the KV pool")
            self._waiting.append(sequence)

    def fits(self, sequence: Sequence) -> bool:
        """Whether some tier's whole pool could hold the sequence at its longest."""
        return self._pages_for(sequence.cached_limit) <= max(pool.capacity for pool in self._pages.values())

    def next_sweep(self) -> Sweep | None:
        """What to compute next, or None when nothing is left. Pages for it are allocated."""
        slices = self._block_slices() if self._plan.schedule == "block" else self._continuous_slices()
        if not slices:
            if self._running or self._waiting:
                raise InternalError(f"{len(self._running)} sequences run and none can go on")
            return None
        self._sweeps += 1
        return Sweep(self._sweeps, tuple(self._pack(slices)))

    @property
    def continues(self) -> bool:
        """Whether, as far as lengths tell, another sweep follows the one just given out."""
        return bool(self._waiting) or any(
            sequence.pending > 1 or len(sequence.tokens) + 1 < sequence.limit for sequence in self._running
        )

    def computed(self, sweep: Sweep) -> None:
        """Note that the KV of the sweep's tokens is stored."""
        for piece in sweep.slices:
            piece.sequence.computed = piece.stop

    def retire(self, sequence: Sequence) -> None:
        """A sequence is finished: its place and pages are free."""
        self._running.remove(sequence)
        self._pages[sequence.tier].release(sequence.pages)
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
                    yield MicroBatch(pieces, tier, self._hidden.choose(tokens), streamed)

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
        while budget > 0 and self._waiting and len(self._running) < self._plan.max_sequences:
            home = self._home_for(self._waiting[0])
            if home is None:
                break
            computing = self._prefill(self._admit(home), budget, slices)
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
                left[home] -= self._pages_for(self._waiting[0].cached_limit)
                if left[home] < 0:
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
            at_home = [other for other in self._running if other.tier == sequence.tier]
            youngest = max(at_home, key=lambda other: other.age)
            if spare is not None and (youngest is sequence or youngest.age in spare):
                return False  # a prompt waits for the next sweep rather than undo work of this one
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pages[sequence.tier].release(sequence.pages)
        sequence.computed = 0
        sequence.age = -1
        sequence.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(sequence)

    # --- admission ---------------------------------------------------------------------------------------------

    def _admit(self, tier: str) -> Sequence:
        sequence = self._waiting.popleft()
        sequence.tier = tier
        sequence.age = self._admitted
        self._admitted += 1
        self._running.append(sequence)
        return sequence

    def _home_for(self, candidate: Sequence) -> str | None:
        """The least filled tier that has room for the candidate until it ends, or None."""
        tokens = dict.fromkeys(self._pages, 0)
        for sequence in self._running:
            tokens[sequence.tier] += self._expected_tokens(sequence)
        tiers = [tier for tier, pool in self._pages.items() if pool.capacity]
        tiers.sort(key=lambda tier: tokens[tier] / self._pages[tier].capacity)
        return next((tier for tier in tiers if self._may_admit(candidate, tier)), None)

    def _may_admit(self, candidate: Sequence, tier: str) -> bool:
        """Whether ``tier`` holds all sequences at home there and the candidate at every moment until they end.

        Lengths are the expected ones; at the moment a sequence ends its pages are free for the others. With nothing
        running there the candidate is admitted if it fits alone.
        """
        at_home = [sequence for sequence in self._running if sequence.tier == tier]
        if not at_home:
            return self._pages_for(candidate.cached_limit) <= self._pages[tier].capacity
        fits_alone = self._pages_for(candidate.cached_limit) <= self._pages[tier].capacity
        at_most = sum(self._pages_for(self._expected_tokens(sequence)) for sequence in (*at_home, candidate))
        if at_most <= self._pages[tier].capacity:
            return fits_alone
        ends = sorted(
            (self._expected_tokens(sequence) - len(sequence.tokens), len(sequence.tokens))
            for sequence in (*at_home, candidate)
        )
        length = sum(tokens for _, tokens in ends)
        alive = len(ends)
        for sweeps_left, tokens in ends:
            # Each sequence alive has one page that is partly filled.
            if (length + sweeps_left * alive) // self._plan.page_tokens + alive > self._pages[tier].capacity:
                return False
            length -= tokens
            alive -= 1
        return fits_alone

    def _expected_tokens(self, sequence: Sequence) -> int:
        grown = sequence.prompt_len + round((sequence.limit - sequence.prompt_len) * min(1.0, self._fraction))
        return min(sequence.cached_limit, max(grown, len(sequence.tokens) + 1))

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._plan.page_tokens)
