"""Output lines: the contract's native line, and OpenAI's response bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flexbatch.jobs.native import native_line
from flexbatch.jobs.openai_lines import Answer, response_line
from flexbatch.requests import Result, RowError, TokenLogprobs

WORDS = {1: "Hé", 2: " you", 3: "\ufffd", 4: "\ufffd", 5: "!", 6: "", 7: " y", 8: "Hé"}
LOGPROBS = TokenLogprobs((1, 2), (-0.5, float("-inf")), ({1: -0.5, 8: -2.0}, {5: -0.1, 7: float("nan")}))
RESULT = Result("a", "Hé you", (1, 2), "stop", 3, 2, LOGPROBS)


def respond(result: Result, endpoint: Any, prompt_text: str = "") -> dict[str, Any]:
    line = response_line(result, Answer(endpoint, "00ff", "demo", WORDS.__getitem__, prompt_text))
    assert "\n" not in line
    value: dict[str, Any] = json.loads(line)
    return value


def test_a_native_line() -> None:
    line = native_line(Result('i"d\u2028', "Hé\n", (1, 2), "length", 3, 2))
    assert line == (
        '{"id": "i\\"d\u2028", "text": "Hé\\n", "token_ids": [1, 2], "finish_reason": "length", '
        '"prompt_tokens": 3, "completion_tokens": 2, "error": null}'
    )


def test_native_logprobs_are_strict_json() -> None:
    value = json.loads(native_line(RESULT), parse_constant=pytest.fail)
    assert list(value) == [
        *("id", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs", "error")
    ]
    assert value["logprobs"] == {
        "tokens": [1, 2],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"1": -0.5, "8": -2.0}, {"5": -0.1, "7": None}],
    }


def test_a_native_error_and_adapter() -> None:
    failed = Result("a", "", (), "error", 3, 0, lora="fr", error=RowError("does_not_fit", "too long"))
    value = json.loads(native_line(failed))
    assert (value["lora"], value["error"]) == ("fr", {"type": "does_not_fit", "message": "too long"})


def test_a_chat_completion() -> None:
    assert respond(RESULT, "chat") == {
        "id": "batch_req_00ff",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "req_00ff",
            "body": {
                "id": "chatcmpl-00ff",
                "object": "chat.completion",
                "created": 0,
                "model": "demo",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "Hé you", "refusal": None},
                        "logprobs": {
                            "content": [
                                {
                                    "token": "Hé",
                                    "logprob": -0.5,
                                    "bytes": [72, 195, 169],
                                    "top_logprobs": [
                                        {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169]},
                                        {"token": "Hé", "logprob": -2.0, "bytes": [72, 195, 169]},
                                    ],
                                },
                                {
                                    "token": " you",
                                    "logprob": -9999.0,
                                    "bytes": [32, 121, 111, 117],
                                    "top_logprobs": [
                                        {"token": "!", "logprob": -0.1, "bytes": [33]},
                                        {"token": " y", "logprob": None, "bytes": [32, 121]},
                                    ],
                                },
                            ],
                            "refusal": None,
                        },
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
                "system_fingerprint": None,
            },
        },
        "error": None,
    }


def test_a_completion_with_echo_and_logprobs() -> None:
    logprobs = TokenLogprobs((6, 1, 2), (None, -0.5, -3.0), ({}, {1: -0.5, 8: -2.0}, {7: -1.0}))
    result = Result("a", "", (), "length", 3, 0, logprobs)
    body = respond(result, "completion", "Hé you")["response"]["body"]
    assert (body["id"], body["object"]) == ("cmpl-00ff", "text_completion")
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Hé you",
            "logprobs": {
                "tokens": ["", "Hé", " you"],
                "token_logprobs": [None, -0.5, -3.0],
                # The chosen token is always listed; of two tokens with one text the likelier counts.
                "top_logprobs": [None, {"Hé": -0.5}, {" y": -1.0, " you": -3.0}],
                "text_offset": [0, 0, 2],
            },
            "finish_reason": "length",
        }
    ]


@pytest.mark.parametrize(
    ("tokens", "text", "offsets"),
    [
        ((2, 5), "you!", [0, 3]),  # the first token lost its space
        ((1, 3, 4, 2), "Hé☃ you", [0, 2, 2, 3]),  # two tokens share a character
        ((1, 2, 5), "Hé", [0, 2, 2]),  # a stop string cut the text
    ],
)
def test_text_offsets_point_into_the_text(tokens: tuple[int, ...], text: str, offsets: list[int]) -> None:
    logprobs = TokenLogprobs(tokens, (-1.0,) * len(tokens), ({},) * len(tokens))
    result = Result("a", text, tokens, "stop", 1, len(tokens), logprobs)
    choice = respond(result, "completion")["response"]["body"]["choices"][0]
    assert choice["logprobs"]["text_offset"] == offsets
    assert choice["text"] == text


def test_a_failed_row_has_no_response() -> None:
    failed = Result("a", "", (), "error", 3, 0, error=RowError("does_not_fit", "too long"))
    assert respond(failed, "chat") == {
        "id": "batch_req_00ff",
        "custom_id": "a",
        "response": None,
        "error": {"code": "does_not_fit", "message": "too long"},
    }
