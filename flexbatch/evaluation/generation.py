"""What a harness's generation settings mean here: sampling parameters, and where texts end.

Knows the harness's names of settings, but neither the harness nor a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexbatch.errors import UsageError
from flexbatch.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 256
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Settings of a ``generate_until`` request, with the harness's defaults filled in."""

    max_tokens: int = DEFAULT_NEW_TOKENS
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> GenerationSettings:
        """Read a request's settings as the harness's own backends do; UsageError names one that is not supported.

        Without ``do_sample`` the temperature decides; with ``do_sample`` false it counts as 0.
        """
        left = dict(given)
        lengths = [left.pop(name, None) for name in _LENGTHS]
        until = left.pop("until", None) or ()
        do_sample = left.pop("do_sample", None)
        temperature = float(left.pop("temperature", 0.0) or 0.0) if do_sample is not False else 0.0
        left.pop("temperature", None)
        sampling = {name: left.pop(name) for name in ("top_p", "top_k", "seed") if left.get(name) is not None}
        unknown = {name for name, value in left.items() if value is not None and (name, value) not in _HARMLESS}
        if unknown:
            raise UsageError(f"generation_kwargs: {min(unknown)} is not supported: take it out of the task")
        return cls(
            max_tokens=int(next((length for length in lengths if length is not None), DEFAULT_NEW_TOKENS)),
            until=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            temperature=temperature,
            sampling=sampling,
        )

    def params(self, stop_token_ids: Sequence[int], special: Mapping[str, int], run_seed: int) -> SamplingParams:
        """The sampling parameters; ``special`` has the ids of special tokens, whose text never shows in an output."""
        tokens = {*stop_token_ids, *(special[text] for text in self.until if text in special)}
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            run_seed=run_seed,
            stop=tuple(text for text in self.until if text not in special),
            stop_token_ids=tuple(sorted(tokens)),
            **self.sampling,
        )


_HARMLESS = (
    ("num_beams", 1),
    ("repetition_penalty", 1.0),
    ("repetition_penalty", 1),
    ("min_p", 0),
    ("use_cache", True),
)
