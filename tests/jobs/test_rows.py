"""Input rows: what both formats mean, and every way a line can be wrong, with its number and reason."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from flexbatch.errors import ExitCode, InputError
from flexbatch.jobs.rows import JobInput, read_rows, require_valid
from flexbatch.requests import Request
from flexbatch.sampling import SamplingParams

DEFAULTS = SamplingParams(max_tokens=9, temperature=0.5, top_k=4, stop=("END",), logprobs=2, run_seed=11)
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"


def parse(tmp_path: Path, *lines: str | bytes | dict[str, Any]) -> JobInput:
    path = tmp_path / "rows.jsonl"
    raw = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in raw))
    return read_rows(str(path), DEFAULTS)


def only(job: JobInput) -> Request:
    (row,) = job.rows
    assert row.error is None
    assert row.request is not None
    assert row.request.id == row.id
    return row.request


def batch(url: str, body: object, **more: object) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body, **more}


def test_a_native_row_takes_the_defaults(tmp_path: Path) -> None:
    assert only(parse(tmp_path, {"prompt": "hello"})) == Request("1", DEFAULTS, prompt="hello")


def test_a_rows_own_values_win(tmp_path: Path) -> None:
    values = {"max_tokens": 0, "temperature": 0, "top_p": 0.25, "top_k": 1, "seed": 7, "logprobs": 0, "echo": True}
    request = only(parse(tmp_path, {"id": "x", "prompt": [3, 0, 5], "stop": "one", **values}))
    assert (request.id, request.prompt, request.params.stop) == ("x", (3, 0, 5), ("one",))
    assert {name: getattr(request.params, name) for name in values} == values
    assert request.params.run_seed == 11
    assert not request.params.ignore_eos


def test_null_counts_as_not_given(tmp_path: Path) -> None:
    fields = dict.fromkeys(("id", "messages", "max_tokens", "seed", "stop", "logprobs", "lora", "echo"))
    assert only(parse(tmp_path, {"prompt": "p", **fields})) == Request("1", DEFAULTS, prompt="p")


def test_messages_keep_their_fields_and_join_text_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": parts, "name": "ann"}]
    request = only(parse(tmp_path, {"messages": messages}))
    assert request.prompt is None
    assert request.messages == ({"role": "system", "content": ""}, {"role": "user", "content": "ab", "name": "ann"})


def test_ids_default_to_line_numbers_and_blank_lines_count(tmp_path: Path) -> None:
    job = parse(tmp_path, '{"prompt": "a"}', "", "  \t", '{"prompt": "b"}\r')
    assert [(row.index, row.line, row.id) for row in job.rows] == [(0, 1, "1"), (1, 4, "4")]


def test_a_line_separator_inside_text_ends_no_row(tmp_path: Path) -> None:
    assert only(parse(tmp_path, '{"prompt": "a\u2028b\x85c"}')).prompt == "a\u2028b\x85c"


def test_a_byte_order_mark_is_tolerated_and_the_digest_covers_all_bytes(tmp_path: Path) -> None:
    job = parse(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}')
    assert only(job).prompt == "a"
    assert job.digest == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()


def test_a_last_line_without_end_counts(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}')
    assert len(read_rows(str(tmp_path / "rows.jsonl"), DEFAULTS).rows) == 2


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n{"prompt": 1}\n')))
    job = read_rows("-", DEFAULTS)
    assert [row.error is None for row in job.rows] == [True, False]
    with pytest.raises(InputError, match=r"^standard input: 1 of 2 rows"):
        require_valid(job.name, job.rows)


def test_an_openai_chat_row(tmp_path: Path) -> None:
    message = {"role": "user", "content": "hi"}
    body = {
        "model": "anything",
        "messages": [message],
        "max_completion_tokens": 3,
        "temperature": 1.5,
        "top_p": 0.5,
        "seed": 4,
        "stop": ["x", "y"],
        "logprobs": True,
        "top_logprobs": 5,
        "n": 1,
        "stream": False,
        "user": "me",
        "metadata": {"k": "v"},
        "store": True,
        "service_tier": "flex",
        "presence_penalty": 0.0,
        "frequency_penalty": None,
        "tools": None,
        "logit_bias": {},
        "response_format": {"type": "text"},
    }
    job = parse(tmp_path, batch(CHAT_URL, body))
    params = SamplingParams(3, 1.5, 0.5, 4, seed=4, run_seed=11, stop=("x", "y"), logprobs=5)
    assert only(job) == Request("a", params, messages=(message,))
    assert job.rows[0].endpoint == "chat"


@pytest.mark.parametrize(
    ("asked", "logprobs"),
    [({}, 2), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3)],
)
def test_chat_logprobs(tmp_path: Path, asked: dict[str, Any], logprobs: int | None) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], **asked}
    assert only(parse(tmp_path, batch(CHAT_URL, body))).params.logprobs == logprobs


@pytest.mark.parametrize(
    ("prompt", "taken"), [("text", "text"), (["text"], "text"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2))]
)
def test_an_openai_completion_row(tmp_path: Path, prompt: object, taken: object) -> None:
    job = parse(tmp_path, batch(TEXT_URL, {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, "top_k": 2}))
    request = only(job)
    assert request.prompt == taken
    assert (request.params.max_tokens, request.params.echo, request.params.logprobs) == (0, True, 1)
    assert request.params.top_k == 2
    assert job.rows[0].endpoint == "completion"


def test_digests_tell_rows_apart(tmp_path: Path) -> None:
    first = parse(tmp_path, {"id": "a", "prompt": "x"}).rows[0].digest
    assert parse(tmp_path, {"id": "a", "prompt": "x"}).rows[0].digest == first
    assert parse(tmp_path, {"id": "a", "prompt": "y"}).rows[0].digest != first


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
NATIVE_FAULTS: list[tuple[str | bytes | dict[str, Any], str]] = [
    ('{"prompt": "a"', "not JSON"),
    ('{"prompt": "a"} x', "not JSON (Extra data at column 17)"),
    ("[1]", "must be an object, not [1]"),
    ("null", "must be an object, not None"),
    ('{"prompt": "a", "temperature": NaN}', "it holds NaN"),
    ('{"prompt": "a", "temperature": -Infinity}', "it holds -Infinity"),
    ('{"prompt": "a", "temperature": 1e999}', "temperature must be a finite number"),
    ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", "temperature must be from 0"),
    ('{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "not JSON"),
    ("[" * 200_000, "not JSON"),
    (b'{"prompt": "a\xff"}', "not UTF-8 (byte 14 of the line is 0xff)"),
    ('{"prompt": "\\ud800"}', "half a surrogate pair"),
    ('{"id": "\\udc00", "prompt": "a"}', "half a surrogate pair"),
    ('{"prompt": "a", "prompt": "b"}', "gives 'prompt' twice"),
    ({}, "exactly one of prompt and messages"),
    ({"prompt": "a", **CHAT}, "exactly one of prompt and messages"),
    ({"prompt": None}, "exactly one of prompt and messages"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": 5}, "prompt must be a string or a list of token ids, not 5"),
    ({"prompt": ["a"]}, "prompt holds 'a', which is not a token id"),
    ({"prompt": [1, True]}, "prompt holds True"),
    ({"prompt": [1, -1]}, "prompt holds -1"),
    ({"prompt": [1.0]}, "prompt holds 1.0"),
    ({"prompt": "a", "id": 7}, "id must be a string, not 7"),
    ({"prompt": "a", "id": ""}, "id is empty"),
    ({"prompt": "a", "max_token": 7}, "unknown field max_token"),
    ({"prompt": "a", "max_tokens": "7"}, "max_tokens must be a whole number"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens must be a whole number"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens must be a whole number"),
    ({"prompt": "a", "temperature": "hot"}, "temperature must be a finite number"),
    ({"prompt": "a", "temperature": -1}, "temperature must be from 0"),
    ({"prompt": "a", "top_p": 0}, "top_p must be above 0"),
    ({"prompt": "a", "top_k": -1}, "top_k must be a whole number"),
    ({"prompt": "a", "seed": True}, "seed must be a whole number"),
    ({"prompt": "a", "stop": 5}, "stop must be a string or a list of strings"),
    ({"prompt": "a", "stop": ["x", 5]}, "stop must be a string or a list of strings"),
    ({"prompt": "a", "stop": ""}, "stop must be one or more non-empty strings"),
    ({"prompt": "a", "logprobs": True}, "logprobs must be a whole number"),
    ({"prompt": "a", "echo": 1}, "echo must be true or false"),
    ({"prompt": "a", "lora": "fr"}, "unknown adapter 'fr'"),
    ({"messages": []}, "messages is empty"),
    ({"messages": {"role": "user"}}, "messages must be a list"),
    ({"messages": ["hi"]}, "messages[0] must be an object, not 'hi'"),
    ({"messages": [{"content": "a"}]}, "messages[0] has no role"),
    ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
    ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role must be a string"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content must be a string"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0] must be"),
]
BATCH_FAULTS: list[tuple[str | bytes | dict[str, Any], str]] = [
    ({"custom_id": "a", "url": CHAT_URL, "body": CHAT}, "has no method"),
    ({"custom_id": "a", "method": "POST", "body": CHAT}, "has no url"),
    ({"method": "POST", "url": CHAT_URL, "body": CHAT}, "has no custom_id"),
    (batch(CHAT_URL, CHAT, custom_id=3), "custom_id must be a string, not 3"),
    (batch(CHAT_URL, CHAT, method="GET"), "method must be POST, not 'GET'"),
    (batch("/v1/embeddings", CHAT), "url must be one of /v1/chat/completions, /v1/completions"),
    (batch(CHAT_URL, CHAT, extra=1), "unknown field extra"),
    (batch(CHAT_URL, []), "body must be an object, not []"),
    (batch(CHAT_URL, {}), "has no body.messages"),
    (batch(TEXT_URL, {}), "has no body.prompt"),
    (batch(TEXT_URL, {"prompt": ["a", "b"]}), "body.prompt holds 2 prompts"),
    (batch(TEXT_URL, {"prompt": [""]}), "body.prompt is empty"),
    (batch(TEXT_URL, {"prompt": "a", "n": 2}), "body.n 2 is not supported"),
    (batch(TEXT_URL, {"prompt": "a", "n": True}), "body.n True is not supported"),
    (batch(TEXT_URL, {"prompt": "a", "best_of": 3}), "body.best_of 3 is not supported"),
    (batch(TEXT_URL, {"prompt": "a", "stream": True}), "body.stream True is not supported"),
    (batch(TEXT_URL, {"prompt": "a", "suffix": "z"}), "body.suffix 'z' is not supported"),
    (batch(TEXT_URL, {"prompt": "a", "messages": []}), "body.messages is not supported for completion rows"),
    (batch(TEXT_URL, {"prompt": "a", "temperature": "x"}), "body.temperature must be a finite number"),
    (batch(TEXT_URL, {"prompt": "a", "logprobs": True}), "body.logprobs must be a whole number"),
    (batch(TEXT_URL, {"prompt": "a", "model": 5}), "body.model must be a string"),
    (batch(CHAT_URL, {**CHAT, "tools": [{}]}), "body.tools [{}] is not supported"),
    (batch(CHAT_URL, {**CHAT, "response_format": {"type": "json_object"}}), "body.response_format"),
    (batch(CHAT_URL, {**CHAT, "logit_bias": {"5": 1}}), "body.logit_bias"),
    (batch(CHAT_URL, {**CHAT, "presence_penalty": 0.1}), "body.presence_penalty 0.1 is not supported"),
    (batch(CHAT_URL, {**CHAT, "echo": True}), "body.echo is not supported for chat rows"),
    (batch(CHAT_URL, {**CHAT, "wishes": 1}), "body.wishes is not supported"),
    (batch(CHAT_URL, {**CHAT, "logprobs": 2}), "body.logprobs must be true or false, not 2"),
    (batch(CHAT_URL, {**CHAT, "top_logprobs": 2}), "body.top_logprobs needs body.logprobs true"),
    (batch(CHAT_URL, {**CHAT, "max_tokens": 1, "max_completion_tokens": 1}), "gives both body.max_tokens and"),
]


@pytest.mark.parametrize(("line", "reason"), NATIVE_FAULTS + BATCH_FAULTS)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes | dict[str, Any], reason: str) -> None:
    job = parse(tmp_path, {"id": "good", "prompt": "x"}, "", line)
    good, bad = job.rows
    assert good.error is None
    assert bad.request is None
    assert bad.error is not None
    assert reason in bad.error
    with pytest.raises(InputError) as caught:
        require_valid(job.name, job.rows)
    assert caught.value.exit_code is ExitCode.USAGE
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path / 'rows.jsonl'}: 1 of 2 rows invalid")
    assert second == f"  line 3: {bad.error}"


def test_a_duplicate_id_names_the_first(tmp_path: Path) -> None:
    # The second row's default id is its line number, which the first already uses.
    first, second, third = parse(tmp_path, {"id": "2", "prompt": "x"}, {"prompt": "y"}, {"id": "b", "prompt": "z"}).rows
    assert (first.error, third.error) == (None, None)
    assert second.error == "duplicate id '2', first on line 1"


def test_twenty_bad_lines_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    job = parse(tmp_path, *['{"prompt": 1}'] * 25)
    with pytest.raises(InputError) as caught:
        require_valid(job.name, job.rows)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:21]] == [f"  line {number}" for number in range(1, 21)]
    assert lines[21:] == ["  and 5 more"]


def test_an_invalid_row_keeps_its_id_and_format(tmp_path: Path) -> None:
    lines = ({"id": "n", "prompt": 1}, batch(CHAT_URL, {}), {"id": 5, "prompt": 1})
    assert [(row.id, row.endpoint is not None) for row in parse(tmp_path, *lines).rows] == [
        ("n", False),
        ("a", True),
        ("3", False),
    ]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda _: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "holds no rows"),
        (lambda path: path.write_bytes(b"\n \n"), "holds no rows"),
    ],
)
def test_an_unusable_file(tmp_path: Path, make: Any, reason: str) -> None:
    path = tmp_path / "in.jsonl"
    make(path)
    with pytest.raises(InputError, match=reason) as caught:
        read_rows(str(path), DEFAULTS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
