"""flexbatch's own row format: an input object becomes a Request, a Result becomes an output line.

Knows nothing of files, and nothing of tokenizers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping

from flexbatch.jobs.fields import (
    BadRowError,
    Json,
    known_adapter,
    messages_field,
    override,
    prompt_field,
    refuse_unknown,
    text_field,
)
from flexbatch.requests import Request, Result, TokenLogprobs
from flexbatch.sampling import SamplingParams

SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logprobs", "echo")
_FIELDS = frozenset({"id", "prompt", "messages", "lora", *SAMPLING_FIELDS})
_UNLIKELY = -9999.0  # stands for minus infinity, which JSON cannot say; the OpenAI API uses the same value


def parse_native(
    row: Mapping[str, Json], default_id: str, defaults: SamplingParams, adapters: Collection[str] = ()
) -> Request:
    """Return the Request of one native row; a field that is null counts as not given. Raises BadRowError.

    ``adapters``: the names that ``lora`` may have.
    """
    refuse_unknown(row, _FIELDS)
    given = {name: value for name, value in row.items() if value is not None}
    row_id = text_field(given, "id") if "id" in given else default_id
    if ("prompt" in given) == ("messages" in given):
        raise BadRowError("needs exactly one of prompt and messages")
    if "lora" in given:
        known_adapter(text_field(given, "lora"), adapters)
    params = override(defaults, {name: given[name] for name in SAMPLING_FIELDS if name in given})
    if "messages" in given:
        return Request(row_id, params, messages=messages_field(given["messages"]), lora=given.get("lora"))
    return Request(row_id, params, prompt=prompt_field(given["prompt"]), lora=given.get("lora"))


def native_line(result: Result) -> str:
    """Return the output line of one result, without its line end; keys stand in a fixed order."""
    line: dict[str, Json] = {
        "id": result.id,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
    }
    if result.logprobs is not None:
        line["logprobs"] = _logprobs(result.logprobs)
    if result.lora is not None:
        line["lora"] = result.lora
    error = result.error
    line["error"] = None if error is None else {"type": error.type, "message": error.message}
    return dump(line)


def dump(value: Json) -> str:
    """Return a value as one line of strict JSON: UTF-8 text unescaped, no NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def finite(logprob: float | None) -> float | None:
    """Return a log-probability that JSON can say: minus infinity becomes -9999, not-a-number becomes None."""
    if logprob is None or math.isnan(logprob):
        return None
    return logprob if math.isfinite(logprob) else _UNLIKELY


def _logprobs(logprobs: TokenLogprobs) -> Json:
    return {
        "tokens": list(logprobs.tokens),
        "token_logprobs": [finite(value) for value in logprobs.token_logprobs],
        "top_logprobs": [{str(token): finite(value) for token, value in top.items()} for top in logprobs.top_logprobs],
    }
