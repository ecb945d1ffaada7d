"""Which prompts of a job begin alike: a radix tree over all of them, in whole pages. Pure; holds no KV.

It knows tokens, not what becomes of them: which pages hold a prefix's KV at a moment is in ``prefix_cache``.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from flexbatch.requests import TokenizedRequest


@dataclass(slots=True, eq=False)
class PrefixScores:
    """Log-probabilities of what follows a prefix's tokens, found once for all rows that score it.

    ``values[i]`` is that of the token behind position ``first + i`` of the prompt, the same one in all rows; behind the
    prefix's last position rows differ: ``branches`` has the log-probability of each token that follows in any of them.
    ``top`` are the most likely ones behind every position, ``most`` of them.
    """

    first: int
    most: int = 0
    follow: set[int] = field(default_factory=set)
    values: list[float] = field(default_factory=list)
    branches: dict[int, float] = field(default_factory=dict)
    top: list[dict[int, float]] = field(default_factory=list)

    @property
    def known_to(self) -> int:
        """The first position of which nothing is known yet."""
        return self.first + len(self.top)


@dataclass(slots=True, eq=False)
class Prefix:
    """Pages ``start .. stop - 1`` of ``rows`` prompts that are alike up to there, behind those of its parent.

    ``path``: from the root to itself. ``order``: its place in the order of ``PrefixTree.order``. The rest changes
    during a run: ``waiting`` rows have not begun (or will begin again), ``scores`` is there where any row scores it.
    """

    start: int
    stop: int
    rows: int
    path: tuple[Prefix, ...] = ()
    order: int = 0
    waiting: int = 0
    scores: PrefixScores | None = None

    @property
    def pages(self) -> int:
        """Its own pages."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """``leaves[i]``: the longest prefix that row i shares with another; None: none."""

    leaves: tuple[Prefix | None, ...]

    @classmethod
    def of(cls, requests: SequenceOf[TokenizedRequest], page_tokens: int) -> PrefixTree:
        """The tree over the prompts of ``requests``; rows of different adapters share nothing.

        A row keeps one token at least to compute itself, for it needs what the model says behind it. Takes time linear
        in the tokens that are shared, and one page more a row.
        """
        prompts = [request.token_ids for request in requests]
        leaves: list[Prefix | None] = [None] * len(prompts)
        shareable = [shareable_tokens(request) // page_tokens for request in requests]
        groups: dict[str | None, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(request.request.lora, []).append(row)
        pending: list[tuple[tuple[Prefix, ...], int, list[int]]] = [((), 0, rows) for rows in groups.values()]
        while pending:
            path, start, rows = pending.pop()
            alike: dict[tuple[int, ...], list[int]] = {}
            for row in rows:
                if shareable[row] > start:
                    page = prompts[row][start * page_tokens : (start + 1) * page_tokens]
                    alike.setdefault(page, []).append(row)
            for same in alike.values():
                if len(same) < 2:
                    continue
                stop = _end(prompts, same, start + 1, min(shareable[row] for row in same), page_tokens)
                prefix = Prefix(start, stop, len(same))
                prefix.path = (*path, prefix)
                for row in same:
                    leaves[row] = prefix
                pending.append((prefix.path, stop, same))
        return cls(tuple(leaves))

    def order(self, lengths: SequenceOf[int]) -> list[int]:
        """Rows so that sharers follow one another, and among what may be swapped the longest ``lengths`` first.

        So a prefix is needed during one stretch of the job only. Equal ones stay in the order of rows. Sets the
        prefixes' own ``order``: parents come before children.
        """
        longest: dict[Prefix, int] = {}
        first: dict[Prefix, int] = {}
        for row, leaf in enumerate(self.leaves):
            for prefix in leaf.path if leaf is not None else ():
                longest[prefix] = max(longest.get(prefix, 0), lengths[row])
                first.setdefault(prefix, row)
        below: dict[Prefix | None, list[int | Prefix]] = {None: []}
        for prefix in first:
            below.setdefault(prefix.path[-2] if len(prefix.path) > 1 else None, []).append(prefix)
        for row, leaf in enumerate(self.leaves):
            below.setdefault(leaf, []).append(row)

        def rank(item: int | Prefix) -> tuple[int, int]:
            if isinstance(item, Prefix):
                return (-longest[item], first[item])
            return (-lengths[item], item)

        rows: list[int] = []
        stack = sorted(below[None], key=rank, reverse=True)
        count = 0
        while stack:
            item = stack.pop()
            if isinstance(item, Prefix):
                item.order = count
                count += 1
                stack += sorted(below.get(item, []), key=rank, reverse=True)
            else:
                rows.append(item)
        return rows

    def shared_pages(self) -> list[int]:
        """Pages of each row that another row computes: all of its prefix that no earlier row begins with it."""
        known: set[Prefix] = set()
        shared: list[int] = []
        for leaf in self.leaves:
            path = leaf.path if leaf is not None else ()
            own = next((prefix for prefix in path if prefix not in known), None)
            known.update(path)
            shared.append(own.start if own is not None else path[-1].stop if path else 0)
        return shared


def shareable_tokens(request: TokenizedRequest) -> int:
    """How many tokens of a prompt others may compute: the row needs what follows the last one, or the one before it."""
    return max(0, len(request.token_ids) - (1 if request.request.params.max_tokens else 2))


def _end(prompts: SequenceOf[tuple[int, ...]], rows: list[int], begin: int, end: int, page_tokens: int) -> int:
    """The page at which ``rows``, alike up to page ``begin``, part; at most ``end``."""
    first = prompts[rows[0]]
    while begin < end:
        span = slice(begin * page_tokens, (begin + 1) * page_tokens)
        page = first[span]
        if any(prompts[row][span] != page for row in rows):
            break
        begin += 1
    return begin
