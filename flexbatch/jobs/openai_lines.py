"""OpenAI's batch response lines: a Result becomes a complete ``completion`` or ``chat.completion`` body.

Knows nothing of files and tokenizers: whoever calls it says what text a token stands for. Nothing here is random:
ids come from the row's digest and ``created`` is 0, so that a resumed run writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flexbatch.jobs.fields import Json
from flexbatch.jobs.native import dump, finite
from flexbatch.jobs.openai import Endpoint
from flexbatch.requests import Result, RowError, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Answer:
    """What a response line needs beside the Result.

    ``digest``: hexadecimal hash of the input row. ``model``: the name of the model that answered. ``prompt_text``:
    what ``echo`` puts before the completion, "" without it. ``token_text``: a token id's own text.
    """

    endpoint: Endpoint
    digest: str
    model: str
    token_text: Callable[[int], str]
    prompt_text: str = ""


def response_line(result: Result, answer: Answer) -> str:
    """Return the batch response line of one result, without its line end."""
    if result.error is not None:
        return error_line(result.id, answer.digest, result.error)
    choice, kind = _chat(result, answer) if answer.endpoint == "chat" else _completion(result, answer)
    body = {
        "id": ("chatcmpl-" if answer.endpoint == "chat" else "cmpl-") + answer.digest,
        "object": kind,
        "created": 0,
        "model": answer.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": result.completion_tokens,
            "total_tokens": result.prompt_tokens + result.completion_tokens,
        },
        "system_fingerprint": None,
    }
    response = {"status_code": 200, "request_id": f"req_{answer.digest}", "body": body}
    return dump({"id": f"batch_req_{answer.digest}", "custom_id": result.id, "response": response, "error": None})


def error_line(custom_id: str, digest: str, error: RowError) -> str:
    """Return the batch response line of a row that failed: no response, and an error with code and message."""
    fault = {"code": error.type, "message": error.message}
    return dump({"id": f"batch_req_{digest}", "custom_id": custom_id, "response": None, "error": fault})


def _chat(result: Result, answer: Answer) -> tuple[Json, str]:
    message = {"role": "assistant", "content": answer.prompt_text + result.text, "refusal": None}
    logprobs = None if result.logprobs is None else _chat_logprobs(result.logprobs, answer.token_text)
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": result.finish_reason}
    return choice, "chat.completion"


def _completion(result: Result, answer: Answer) -> tuple[Json, str]:
    text = answer.prompt_text + result.text
    logprobs = None if result.logprobs is None else _completion_logprobs(result.logprobs, answer.token_text, text)
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": result.finish_reason}
    return choice, "text_completion"


def _chat_logprobs(logprobs: TokenLogprobs, token_text: Callable[[int], str]) -> Json:
    def entry(token: int, logprob: float | None) -> dict[str, Json]:
        text = token_text(token)
        # A token that is part of a character has no text of its own, and its bytes are not known here.
        raw = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": finite(logprob), "bytes": raw}

    content = []
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        ranked = [entry(other, value) for other, value in top.items()]
        content.append({**entry(token, logprob), "top_logprobs": ranked})
    return {"content": content, "refusal": None}


def _completion_logprobs(logprobs: TokenLogprobs, token_text: Callable[[int], str], text: str) -> Json:
    texts = [token_text(token) for token in logprobs.tokens]
    tops = [
        None if logprob is None else _top_by_text(token, logprob, top, token_text)
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    ]
    return {
        "tokens": texts,
        "token_logprobs": [finite(value) for value in logprobs.token_logprobs],
        "top_logprobs": tops,
        "text_offset": _offsets(texts, text),
    }


def _offsets(tokens: list[str], text: str) -> list[int]:
    """Return where in ``text`` each token begins; special tokens, which it leaves out, stand where they would."""
    offsets = []
    place = 0
    for token in tokens:
        # The text may lack the first token's space. Tokens that share one character show as U+FFFD and are not
        # found; the next token that is whole finds its place again, at most a few characters on.
        found = next((part for part in (token, token.lstrip(" ")) if part and text.startswith(part, place)), "")
        if not found and (at := text.find(token, place, place + len(token) + 4)) >= 0 and token.strip():
            found, place = token, at
        offsets.append(place)
        place += len(found)
    return offsets


def _top_by_text(token: int, logprob: float, top: Mapping[int, float], token_text: Callable[[int], str]) -> Json:
    # The chosen token is always listed. Two ids may share a text: the likelier one speaks for it.
    best: dict[str, float | None] = {}
    for other, value in sorted({**top, token: logprob}.items(), key=lambda item: -item[1]):
        best.setdefault(token_text(other), finite(value))
    return best
