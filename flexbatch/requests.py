"""One input row and one output row, as the rest of the program sees them; no file format and no tokenizer here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flexbatch.sampling import SamplingParams

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """One input row: exactly one of ``prompt`` (text or token ids) and ``messages`` (a chat) is set."""

    id: str
    params: SamplingParams
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    lora: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, raw model) of consecutive tokens; the very first of a prompt has none."""

    tokens: tuple[int, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[Mapping[int, float], ...]


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row failed while the others went on."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class Result:
    """One output row. ``token_ids`` are the generated tokens, an end-of-sequence token included."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: TokenLogprobs | None = None
    lora: str | None = None
    error: RowError | None = None


@dataclass(frozen=True, slots=True)
class TokenizedRequest:
    """A request with its prompt encoded. ``index`` is its place in the input, from 0.

    ``score_from``: where the prompt is scored, the first token whose log-probability is wanted.
    """

    request: Request
    index: int
    token_ids: tuple[int, ...]
    score_from: int = 1
