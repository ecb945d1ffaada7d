"""A request while it runs: its tokens, how far its KV cache reaches, its pages. Pure state; no tensors, no text."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from flexbatch.requests import FinishReason, TokenizedRequest
from flexbatch.scheduler.pages import PageTable
from flexbatch.scheduler.prefixes import Prefix


@dataclass(slots=True)
class LogprobRecord:
    """Log-probabilities of consecutive tokens as they are found; ``top`` has one mapping a token."""

    values: list[float | None] = field(default_factory=list)
    top: list[dict[int, float]] = field(default_factory=list)


def leading(top: list[dict[int, float]], most: int) -> list[dict[int, float]]:
    """The ``most`` likeliest of each; a mapping that holds no more is not copied."""
    return [entry if len(entry) <= most else dict(islice(entry.items(), most)) for entry in top]


@dataclass(slots=True, eq=False)
class Sequence:
    """One running request.

    ``tokens`` is the prompt and what was generated; ``computed`` how many of them have their KV stored; ``scored`` how
    many prompt tokens have their log-probability; ``limit`` the largest number of tokens it can reach.
    ``tier`` is the home of its KV; ``age`` its place in the order of admission (a larger one is younger).

    ``prefix``: what its prompt shares with others, ``turn`` its place in the order that follows from that, ``shared``
    how many of its pages are a prefix's. Of the positions ``records`` it finds the log-probabilities for others, too,
    with the ``prompt_top`` most likely tokens, and those of ``branches``, tokens that follow in others, by position.
    (``scheduler.prefix_cache`` fills all these in.)
    """

    source: TokenizedRequest
    limit: int
    tokens: list[int]
    computed: int = 0
    scored: int = 1
    pages: PageTable = field(default_factory=PageTable)
    tier: str = "cpu"
    age: int = -1
    preemptions: int = 0
    finish_reason: FinishReason | None = None
    prompt_logprobs: LogprobRecord = field(default_factory=LogprobRecord)
    logprobs: LogprobRecord = field(default_factory=LogprobRecord)
    prefix: Prefix | None = None
    turn: int = 0
    shared: int = 0
    records: range = range(0)
    prompt_top: int = 0
    branches: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: TokenizedRequest, max_positions: int) -> Sequence:
        """Start a sequence; its limit is its own ``max_tokens`` or the model's window, whichever is smaller.

        The last token of the window may still be followed by one that is only read off, never computed.
        """
        prompt = len(source.token_ids)
        params = source.request.params
        limit = max(prompt, min(prompt + params.max_tokens, max_positions + 1))
        scored = max(1, source.score_from)
        tokens = list(source.token_ids)
        return cls(source=source, limit=limit, tokens=tokens, scored=scored, prompt_top=params.logprobs or 0)

    @property
    def adapter(self) -> str | None:
        """The name of its adapter; None: the base model."""
        return self.source.request.lora

    @property
    def prefixes(self) -> tuple[Prefix, ...]:
        """The prefixes that its prompt begins with, one behind the other."""
        return () if self.prefix is None else self.prefix.path

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.source.token_ids)

    @property
    def generated(self) -> list[int]:
        """The new tokens so far."""
        return self.tokens[self.prompt_len :]

    @property
    def pending(self) -> int:
        """Tokens whose KV is not computed yet: 1 while decoding, more while the prompt is (re)computed.

        The last token of a prompt that is only scored is not among them: nothing is asked about what follows it.
        """
        return len(self.tokens) - self.computed - (not self.wants_tokens)

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is left to compute."""
        return self.pending == 1 and len(self.tokens) > self.prompt_len

    @property
    def wants_tokens(self) -> bool:
        """Whether anything is to be generated, as opposed to scored."""
        return self.limit > self.prompt_len

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of its prompt are wanted."""
        params = self.source.request.params
        return params.echo and params.logprobs is not None

    def note_scores(self, first: int, values: list[float], top: list[dict[int, float]]) -> None:
        """Keep what is new and wanted of the log-probabilities behind the positions ``first ..`` of the prompt."""
        if not self.scores_prompt:
            return
        known = self.scored - 1 - first
        most = self.source.request.params.logprobs or 0
        self.prompt_logprobs.values += values[known:]
        self.prompt_logprobs.top += leading(top[known:], most)
        self.scored = max(self.scored, first + len(values) + 1)

    @property
    def cached_limit(self) -> int:
        """The most tokens whose KV it will ever hold: its last token, generated or scored, is never fed back."""
        return self.limit - 1
