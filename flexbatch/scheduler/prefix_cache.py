"""Where the KV of shared prefixes is while a job runs: on which tier, who computes it, who waits for it. Pure.

The first row of a prefix that is admitted computes it along with the rest of its prompt; as its pages fill they become
everybody's. Rows that come meanwhile are held back until it is there. A tier that rows without a prefix of their own
spread to computes it once more; nothing is copied between tiers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from flexbatch.scheduler.pages import PageAllocator, PageTable
from flexbatch.scheduler.prefixes import Prefix, PrefixScores, PrefixTree
from flexbatch.scheduler.sequence import Sequence, leading
from flexbatch.scheduler.sweep import Slice

_FEW = 16  # waiting rows up to which a prefix is not worth computing again on another tier


@dataclass(slots=True)
class _Copy:
    """A prefix's pages on one tier, in order; fewer than it has while ``leader`` is at them.

    ``users``: running sequences that hold any of them. ``parked``: rows held back until they are all there.
    """

    table: PageTable = field(default_factory=PageTable)
    users: int = 0
    leader: Sequence | None = None
    parked: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class PrefixCounts:
    """What sharing did so far.

    ``tokens`` of prompts that were not computed; ``pages`` that were not taken for them; ``peak``: the most pages
    saved at a time; ``evictions`` of prefixes that were still needed.
    """

    tokens: int = 0
    pages: int = 0
    peak: int = 0
    evictions: int = 0


class PrefixCache:
    """The prefixes of one run, in pages of ``pools``.

    A prefix stays as long as a running row uses it or a waiting one will; of those that nobody uses right now, the one
    needed last goes first when a tier's pages run out. It is computed again when its turn comes. ``counts``: where to
    go on counting.
    """

    def __init__(
        self, pools: Mapping[str, PageAllocator], page_tokens: int, counts: PrefixCounts | None = None
    ) -> None:
        self._pools = pools
        self._page_tokens = page_tokens
        self._copies: dict[tuple[Prefix, str], _Copy] = {}
        self._pinned = dict.fromkeys(pools, 0)
        self._held = 0
        self.parked = 0
        self.counts = counts or PrefixCounts()

    def begin(self, sequences: SequenceOf[Sequence]) -> list[Sequence]:
        """Find what the prompts share, and return the sequences in the order in which they had best be admitted.

        Their order so far decides where nothing is shared.
        """
        tree = PrefixTree.of([sequence.source for sequence in sequences], self._page_tokens)
        for sequence, leaf in zip(sequences, tree.leaves, strict=True):
            sequence.prefix = leaf
            for prefix in sequence.prefixes:
                prefix.waiting += 1
                stop = prefix.stop * self._page_tokens
                if sequence.scores_prompt and sequence.scored <= stop:
                    first = max(prefix.start * self._page_tokens, sequence.scored - 1)
                    scores = prefix.scores = prefix.scores or PrefixScores(first)
                    scores.first = min(scores.first, first)
                    scores.most = max(scores.most, sequence.source.request.params.logprobs or 0)
                    scores.follow.add(sequence.tokens[stop])
        lengths = [sequence.limit - sequence.prompt_len for sequence in sequences]
        ordered = [sequences[place] for place in tree.order(lengths)]
        for turn, sequence in enumerate(ordered):
            sequence.turn = turn
        return ordered

    # --- admission -----------------------------------------------------------------------------------------------

    def covered(self, sequence: Sequence, tier: str) -> int:
        """Pages of its prefix that ``tier`` has."""
        count = 0
        for prefix in sequence.prefixes:
            copy = self._copies.get((prefix, tier))
            if copy is None:
                break
            count += len(copy.table.pages)
            if len(copy.table.pages) < prefix.pages:
                break
        return count

    def idle_pages(self, sequence: Sequence, tier: str) -> int:
        """Pages of its prefix on ``tier`` that no running sequence uses: they will be in use when it runs."""
        copies = (self._copies.get((prefix, tier)) for prefix in sequence.prefixes)
        return sum(len(copy.table.pages) for copy in copies if copy is not None and not copy.users)

    def pinned_pages(self, tier: str) -> int:
        """Pages of prefixes on ``tier`` that running sequences use."""
        return self._pinned[tier]

    def home(self, sequence: Sequence) -> str | None:
        """The tier that a sequence had best go to, for so few others will need its prefix; None: any."""
        for prefix in reversed(sequence.prefixes):
            if prefix.waiting <= _FEW:
                for tier in self._pools:
                    if (prefix, tier) in self._copies:
                        return tier
        return None

    def park(self, sequence: Sequence, tiers: Iterable[str]) -> bool:
        """Hold a sequence back if another computes a part of its prefix right now on each of ``tiers``."""
        found: _Copy | None = None
        for tier in tiers:
            copy = self._incomplete(sequence, tier)
            if copy is None or copy.leader is None:
                return False
            found = found or copy
        if found is None:
            return False
        found.parked.append(sequence)
        self.parked += 1
        return True

    def attach(self, sequence: Sequence) -> None:
        """Give an admitted sequence what its tier has of its prefix; what is missing it computes for all."""
        tier = sequence.tier
        leads = False
        for prefix in sequence.prefixes:
            prefix.waiting -= 1
            copy = self._copies.get((prefix, tier))
            if copy is None:
                copy = self._copies[prefix, tier] = _Copy()
            pages = copy.table.pages
            if pages and not leads:
                self._pools[tier].share(sequence.pages, pages)
                self._use(copy, tier)
                sequence.shared += len(pages)
            if len(pages) < prefix.pages:
                leads = True
                if copy.leader is None:
                    copy.leader = sequence
            stop = prefix.stop * self._page_tokens
            if leads and prefix.scores is not None and prefix.scores.known_to < stop:
                first = sequence.records.start if sequence.records else prefix.scores.known_to
                sequence.records = range(first, stop)
                sequence.prompt_top = max(sequence.prompt_top, prefix.scores.most)
                sequence.branches[stop - 1] = tuple(sorted(prefix.scores.follow))
        sequence.computed = sequence.shared * self._page_tokens
        self._held += sequence.shared
        self.counts.peak = max(self.counts.peak, self._held - sum(self._pinned.values()))
        self.counts.tokens += sequence.computed
        self.counts.pages += sequence.shared
        if sequence.scores_prompt and sequence.scored <= sequence.computed:
            self._hand_out(sequence)

    # --- while it runs -------------------------------------------------------------------------------------------

    def computed(self, sequence: Sequence) -> list[Sequence]:
        """Make pages of its prefix that a sequence has filled everybody's; return the rows that waited for them."""
        released: list[Sequence] = []
        tier = sequence.tier
        for prefix in sequence.prefixes:
            if prefix.stop <= sequence.shared:
                continue
            copy = self._copies[prefix, tier]
            filled = min(sequence.computed // self._page_tokens, prefix.stop) - sequence.shared
            if copy.leader is not sequence or filled <= 0:
                break
            pages = sequence.pages.pages[sequence.shared : sequence.shared + filled]
            if sequence.shared == prefix.start:
                copy.users += 1
            self._pools[tier].share(copy.table, pages)
            self._pinned[tier] += filled
            sequence.shared += filled
            self._held += filled
            if len(copy.table.pages) < prefix.pages:
                break
            copy.leader = None
            released += self._release(copy)
        return released

    def record(
        self,
        piece: Slice,
        values: list[float],
        top: list[dict[int, float]],
        branches: Mapping[int, Mapping[int, float]],
    ) -> None:
        """Note what the head said of positions ``score_from ..`` of a slice, for those that share them."""
        size = self._page_tokens
        for prefix in piece.sequence.prefixes:
            scores = prefix.scores
            if scores is None:
                continue
            at = scores.known_to
            until = min(piece.score_to, prefix.stop * size)
            if not piece.score_from <= at < until:
                continue
            first = at - piece.score_from
            last = until - piece.score_from
            scores.top += top[first:last]
            scores.values += values[first : last - (until == prefix.stop * size)]
            scores.branches.update(branches.get(until - 1, {}))

    def leave(self, sequence: Sequence, *, again: bool) -> list[Sequence]:
        """A sequence runs no more (``again``: until it is admitted again); return the rows that waited for it."""
        released: list[Sequence] = []
        for prefix in reversed(sequence.prefixes):
            copy = self._copies[prefix, sequence.tier]
            if copy.leader is sequence:
                copy.leader = None
                released += self._release(copy)
            if sequence.shared > prefix.start:
                copy.users -= 1
                if not copy.users:
                    self._pinned[sequence.tier] -= len(copy.table.pages)
            prefix.waiting += again
            self._settle(prefix)
        self._held -= sequence.shared
        sequence.shared = 0
        sequence.records = range(0)
        sequence.branches = {}
        return released

    def forget(self, sequence: Sequence) -> None:
        """A waiting sequence will not run."""
        for prefix in reversed(sequence.prefixes):
            prefix.waiting -= 1
            self._settle(prefix)

    def evict(self, tier: str) -> bool:
        """Give back the pages on ``tier`` of the prefix that is needed last of those not in use; False: all are."""
        idle = [
            prefix
            for (prefix, place), copy in self._copies.items()
            if place == tier and copy.table.pages and not copy.users
        ]
        if not idle:
            return False
        last = max(idle, key=lambda prefix: prefix.order)  # no prefix goes before those behind it
        self._pools[tier].release(self._copies[last, tier].table)
        self.counts.evictions += 1
        return True

    # --- parts ---------------------------------------------------------------------------------------------------

    def _incomplete(self, sequence: Sequence, tier: str) -> _Copy | None:
        """The first part of its prefix that ``tier`` has not all of, if there is one at all."""
        for prefix in sequence.prefixes:
            copy = self._copies.get((prefix, tier))
            if copy is None or len(copy.table.pages) < prefix.pages:
                return copy
        return None

    def _use(self, copy: _Copy, tier: str) -> None:
        if not copy.users:
            self._pinned[tier] += len(copy.table.pages)
        copy.users += 1

    def _release(self, copy: _Copy) -> list[Sequence]:
        released, copy.parked = copy.parked, []
        self.parked -= len(released)
        return released

    def _settle(self, prefix: Prefix) -> None:
        """Drop what nobody will need any more."""
        for tier, pool in self._pools.items():
            copy = self._copies.get((prefix, tier))
            if copy is None or copy.users or copy.leader is not None:
                continue
            if not prefix.waiting:
                pool.release(copy.table)
            if not copy.table.pages:
                del self._copies[prefix, tier]
        if not prefix.waiting and not any((prefix, tier) in self._copies for tier in self._pools):
            prefix.scores = None

    def _hand_out(self, sequence: Sequence) -> None:
        """Give a sequence the log-probabilities of its prompt up to the first token behind what it shares."""
        most = sequence.source.request.params.logprobs or 0
        given = sequence.prompt_logprobs
        for prefix in sequence.prefixes:
            stop = prefix.stop * self._page_tokens
            last = min(sequence.computed, stop)
            scores = prefix.scores
            if scores is None or last < sequence.scored:
                continue
            part = slice(sequence.scored - 1 - scores.first, last - scores.first)
            given.values += scores.values[part]
            given.top += leading(scores.top[part], most)
            if last == stop:
                given.values.append(scores.branches[sequence.tokens[stop]])
            sequence.scored = last + 1
