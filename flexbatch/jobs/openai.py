"""OpenAI's batch row format: which request bodies are accepted, and what each field of one means here.

Knows nothing of files, and nothing of responses (see ``openai_lines.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

from flexbatch.jobs.fields import (
    BadRowError,
    Json,
    known_adapter,
    messages_field,
    override,
    prompt_field,
    refuse_unknown,
    show,
    text_field,
)
from flexbatch.requests import Request
from flexbatch.sampling import SamplingParams

Endpoint = Literal["chat", "completion"]

_ENDPOINTS: dict[str, Endpoint] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
_ROW_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_MARKS = ("custom_id", "body", "url")
_SHARED = frozenset({"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logprobs"})
_OWN: dict[Endpoint, frozenset[str]] = {
    "chat": _SHARED | {"messages", "max_completion_tokens", "top_logprobs"},
    "completion": _SHARED | {"prompt", "echo"},
}
# Fields that do not change a row's result, whatever they say.
_HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "stream_options", "safety_identifier"}
    | {"prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}
)
# Fields that would change results: accepted only where they say what we do anyway.
_NEUTRAL: dict[str, tuple[Json, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
}


def is_openai(row: Mapping[str, Json]) -> bool:
    """Whether a row means to be in OpenAI's batch format."""
    return any(name in row for name in _MARKS)


def parse_openai(
    row: Mapping[str, Json], defaults: SamplingParams, adapters: Collection[str] = (), model: str = ""
) -> tuple[Request, Endpoint]:
    """Return the Request of one batch row and the endpoint whose answer it wants. Raises BadRowError naming the field.

    A field that is null counts as not given. ``body.model`` may say anything while there are no ``adapters``; else it
    names one of them, or ``model``, the base model.
    """
    refuse_unknown(row, _ROW_FIELDS)
    for name in ("custom_id", "method", "url", "body"):
        if name not in row:
            raise BadRowError(f"has no {name}")
    custom_id = text_field(row, "custom_id")
    if row["method"] != "POST":
        raise BadRowError(f"method must be POST, not {show(row['method'])}")
    endpoint = _ENDPOINTS.get(row["url"]) if isinstance(row["url"], str) else None
    if endpoint is None:
        raise BadRowError(f"url must be one of {', '.join(_ENDPOINTS)}, not {show(row['url'])}")
    if not isinstance(row["body"], dict):
        raise BadRowError(f"body must be an object, not {show(row['body'])}")
    body = {name: value for name, value in row["body"].items() if value is not None}
    _refuse_unsupported(body, endpoint)
    adapter = _adapter(body, adapters, model)
    request = _chat(custom_id, body, defaults) if endpoint == "chat" else _completion(custom_id, body, defaults)
    return replace(request, lora=adapter), endpoint


def _adapter(body: Mapping[str, Json], adapters: Collection[str], model: str) -> str | None:
    name = text_field(body, "model", "body.") if "model" in body else model
    if not adapters or (name not in adapters and name in (model, model.rstrip("/").rpartition("/")[2])):
        return None
    known_adapter(name, adapters, f", and {show(model)} for the base model")
    return name


def _refuse_unsupported(body: Mapping[str, Json], endpoint: Endpoint) -> None:
    for name, value in body.items():
        if name in _OWN[endpoint] or name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            raise BadRowError(f"body.{name} is not supported for {endpoint} rows")
        if isinstance(value, bool) != isinstance(_NEUTRAL[name][0], bool) or value not in _NEUTRAL[name]:
            accepted = " or ".join(show(neutral) for neutral in _NEUTRAL[name])
            raise BadRowError(f"body.{name} {show(value)} is not supported: leave it out, or give {accepted}")


def _chat(custom_id: str, body: Mapping[str, Json], defaults: SamplingParams) -> Request:
    if "messages" not in body:
        raise BadRowError("has no body.messages")
    values = _shared_values(body)
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise BadRowError("gives both body.max_tokens and body.max_completion_tokens")
        values["max_tokens"] = body["max_completion_tokens"]
    wanted = body.get("logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise BadRowError(f"body.logprobs must be true or false, not {show(wanted)}")
    if "top_logprobs" in body and not wanted:
        raise BadRowError("body.top_logprobs needs body.logprobs true")
    if wanted is not None:
        values["logprobs"] = body.get("top_logprobs", 0) if wanted else None
    messages = messages_field(body["messages"], "body.")
    return Request(custom_id, override(defaults, values, "body."), messages=messages)


def _completion(custom_id: str, body: Mapping[str, Json], defaults: SamplingParams) -> Request:
    if "prompt" not in body:
        raise BadRowError("has no body.prompt")
    values = _shared_values(body)
    values.update({name: body[name] for name in ("logprobs", "echo") if name in body})
    params = override(defaults, values, "body.")
    prompt = body["prompt"]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise BadRowError(f"body.prompt holds {len(prompt)} prompts: write one row for each")
        prompt = prompt[0]
    return Request(custom_id, params, prompt=prompt_field(prompt, "body."))


def _shared_values(body: Mapping[str, Json]) -> dict[str, Json]:
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    return {name: body[name] for name in names if name in body}
