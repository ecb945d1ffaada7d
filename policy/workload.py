"""What a job asks for: how many sequences, how long. Pure numbers taken from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexbatch.requests import TokenizedRequest


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompt and generation lengths of every row, in tokens; ``adapters``: the different ones that rows name."""

    prompts: tuple[int, ...]
    generations: tuple[int, ...]
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, requests: Sequence[TokenizedRequest]) -> Workload:
        """The workload of a job's rows; generation lengths are the upper bounds the rows set."""
        return cls(
            prompts=tuple(len(request.token_ids) for request in requests),
            generations=tuple(request.request.params.max_tokens for request in requests),
            adapters=tuple(sorted({request.request.lora for request in requests if request.request.lora is not None})),
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

    def longest(self, max_positions: int) -> int:
        """The most tokens of KV that one row can come to hold."""
        lengths = (
            min(prompt + max(0, new - 1), max_positions)
            for prompt, new in zip(self.prompts, self.generations, strict=True)
        )
        return max(lengths, default=0)

    def shortest(self, max_positions: int) -> int:
        """The fewest tokens of KV that any row needs at its longest."""
        lengths = (
            min(prompt + max(0, new - 1), max_positions)
            for prompt, new in zip(self.prompts, self.generations, strict=True)
        )
        return min(lengths, default=0)
