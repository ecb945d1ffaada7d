"""How tokens are chosen for one request: the values a user can set, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexbatch.errors import UsageError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one request.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 switch those filters off. ``seed`` makes a row
    reproducible on its own; without one, its stream is derived from ``run_seed`` and the row's id, so that no row's
    sample depends on its neighbours. ``stop`` strings end the text before themselves; a token of ``stop_token_ids``
    ends it like one of end of sequence, also with ``ignore_eos``. ``logprobs`` K gives the log-probability of each
    token and of the K most likely ones (0: of the token alone; None: off). ``echo`` includes the prompt; with
    ``max_tokens`` 0 and ``logprobs`` it scores it. Raises UsageError on a value out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    run_seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    echo: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _whole("max_tokens", self.max_tokens, 0, 2**31)
        _number("temperature", self.temperature, 0, 1e6)
        _number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise UsageError("top_p must be above 0 and at most 1, not 0")
        _whole("top_k", self.top_k, 0, 2**31)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64)
        _whole("seed", self.run_seed, -(2**63), 2**64)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, 1000)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UsageError("stop must be one or more non-empty strings")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, 2**31)
        for name in ("ignore_eos", "echo"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, not {getattr(self, name)!r}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
        raise UsageError(f"{name} must be a finite number, not {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{name} must be from {low:g} to {high:g}, not {value!r}")
