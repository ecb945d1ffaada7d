"""What a job asks for: how many sequences, how long. Pure numbers taken from the rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from flexbatch.policy.cost import Load, keys_of, pairs_of
from flexbatch.policy.footprint import PAGE_TOKENS
from flexbatch.requests import TokenizedRequest
from flexbatch.scheduler.prefixes import PrefixTree


@dataclass(frozen=True, slots=True)
class Mean:
    """A job's steady state, for one sequence in flight and one sweep.

    ``sweeps`` that a row is in flight; ``tokens`` it is given a sweep (about 1; where all
    rows only score, tokens of their prompts); ``pages`` it holds;
    ``decode`` and ``prompt``: what its decoding and its prompt ask of each layer.
    ``standing``: pages of shared prefixes that are held besides; ``most`` a row holds of its own at its longest.
    ``spread``: standard deviation of the sweeps, relative to their mean.
    """

    rows: int
    sweeps: float
    tokens: float
    pages: float
    decode: Load
    prompt: Load
    standing: int = 0
    most: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Prompt and generation lengths of every row, in tokens; ``adapters``: the different ones that rows name.

    ``shared``: how many tokens of each prompt another row computes (empty: none of any); ``prefixes``: how many each
    begins with that others begin with, too, whoever computes them.
    """

    prompts: tuple[int, ...]
    generations: tuple[int, ...]
    adapters: tuple[str, ...] = ()
    shared: tuple[int, ...] = ()
    prefixes: tuple[int, ...] = ()

    @classmethod
    def of(cls, requests: Sequence[TokenizedRequest], *, share_prefixes: bool = True) -> Workload:
        """The workload of a job's rows; generation lengths are the upper bounds the rows set."""
        names = [request.request.lora for request in requests]
        shared: tuple[int, ...] = ()
        prefixes: tuple[int, ...] = ()
        if share_prefixes:
            tree = PrefixTree.of(requests, PAGE_TOKENS)
            if any(tree.leaves):
                shared = tuple(PAGE_TOKENS * pages for pages in tree.shared_pages())
                prefixes = tuple(PAGE_TOKENS * leaf.path[-1].stop if leaf else 0 for leaf in tree.leaves)
        return cls(
            prompts=tuple(len(request.token_ids) for request in requests),
            generations=tuple(request.request.params.max_tokens for request in requests),
            adapters=tuple(sorted({name for name in names if name is not None})),
            shared=shared,
            prefixes=prefixes,
        )

    @classmethod
    def uniform(cls, prompt_len: int, gen_len: int, num_requests: int) -> Workload:
        """``num_requests`` rows of the same lengths."""
        return cls((prompt_len,) * num_requests, (gen_len,) * num_requests)

    @property
    def num_requests(self) -> int:
        """Rows."""
        return len(self.prompts)

    @property
    def prompt_len(self) -> float:
        """Mean prompt length."""
        return sum(self.prompts) / max(1, len(self.prompts))

    @property
    def gen_len(self) -> float:
        """Mean generation length."""
        return sum(self.generations) / max(1, len(self.generations))

    @cached_property
    def _lengths(self) -> tuple[int, int]:
        """Tokens of KV that the shortest and the longest row would come to hold."""
        rows = set(zip(self.prompts, self.generations, strict=True))
        lengths = [prompt + max(0, new - 1) for prompt, new in rows] or [0]
        return min(lengths), max(lengths)

    def longest(self, max_positions: int) -> int:
        """The most tokens of KV that one row can come to hold."""
        return min(self._lengths[1], max_positions)

    def shortest(self, max_positions: int) -> int:
        """The fewest tokens of KV that any row needs at its longest."""
        return min(self._lengths[0], max_positions)

    def shorter_half(self) -> Workload | None:
        """The rows no longer than the middle one of different lengths; None if all are equally long."""
        lengths = [prompt + new for prompt, new in zip(self.prompts, self.generations, strict=True)]
        kinds = sorted(set(lengths))
        if len(kinds) < 2:
            return None
        most = kinds[len(kinds) // 2 - 1]
        kept = [place for place, length in enumerate(lengths) if length <= most]
        prompts = tuple(self.prompts[at] for at in kept)
        return Workload(prompts, tuple(self.generations[at] for at in kept), self.adapters)  # shares nothing: safe

    def mean(self, max_positions: int, page_tokens: int, windows: Mapping[int | None, int], *, block: bool) -> Mean:
        """What one sequence in flight asks of a sweep, on average over the time that the rows are in flight.

        ``windows``: how many layers have each attention window. ``block``: KV is held for the longest row throughout.
        """
        none = (0,) * len(self.prompts)
        shares = none if block or not self.shared else tuple(at // page_tokens * page_tokens for at in self.shared)
        kinds = Counter(zip(self.prompts, self.generations, shares, strict=True))
        layers = sum(windows.values())
        sweeps = squares = new = prompt = pairs = keys = filled = dirty = pages = 0.0
        for (length, asked, shared), count in kinds.items():
            steps = max(1, min(asked, max_positions + 1 - length))
            decoding = steps - 1
            middle = length + 1 + (decoding - 1) / 2
            sweeps += count * steps
            squares += count * steps * steps
            new += count * min(asked, steps)
            prompt += count * (length - shared)
            dirty += count * (-(-length // page_tokens) - shared // page_tokens + decoding)
            filled += count * decoding * ((middle - 1) / page_tokens + 0.5)
            pages += count * steps * ((min(middle, length + decoding) - shared) / page_tokens + 1)
            for window, number in windows.items():
                part = count * number / layers
                pairs += part * pairs_of(shared, length, window)
                keys += part * decoding * keys_of(middle + page_tokens / 2, 1, window)
        sweeps = max(1.0, sweeps)
        longest = -(-self.longest(max_positions) // page_tokens)
        return Mean(
            rows=self.num_requests,
            sweeps=sweeps / max(1, self.num_requests),
            tokens=(new or prompt) / sweeps,
            pages=float(longest) if block else min(float(longest), pages / sweeps),
            decode=Load(
                tokens=(sweeps - self.num_requests) / sweeps,
                decoding=(sweeps - self.num_requests) / sweeps,
                keys=keys / sweeps,
                filled=filled / sweeps,
                dirty=(sweeps - self.num_requests) / sweeps,
                readouts=(sweeps - self.num_requests) / sweeps,
            ),
            prompt=Load(
                tokens=prompt / sweeps,
                pairs=pairs / sweeps,
                dirty=(dirty - (sweeps - self.num_requests)) / sweeps,
                readouts=self.num_requests / sweeps,
            ),
            standing=0 if block else max(self.prefixes, default=0) // page_tokens,
            most=float(longest) if block or not self.shared else self._most(max_positions, page_tokens),
            spread=math.sqrt(max(0.0, squares * self.num_requests / sweeps**2 - 1)),
        )

    def _most(self, max_positions: int, page_tokens: int) -> float:
        """Pages that a row holds of its own at its longest, with its part of prefixes that few share."""
        rows = zip(self.prompts, self.generations, self.prefixes, strict=True)
        own = max(
            -(-min(prompt + max(0, new - 1), max_positions) // page_tokens) - prefix // page_tokens
            for prompt, new, prefix in rows
        )
        computed = sum(prefix - shared for prefix, shared in zip(self.prefixes, self.shared, strict=True))
        return own + computed / page_tokens / max(1, self.num_requests)
