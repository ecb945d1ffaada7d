"""Rows to train on: what each form becomes, and what is said of those that are none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from flexbatch.errors import InputError
from flexbatch.jobs.training_rows import Chat, Completion, Text, read_training_rows, training_rows

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}

GOOD: list[tuple[dict[str, Any], Text | Completion | Chat]] = [
    ({"text": "abc"}, Text("abc")),
    ({"id": "x", "text": [1, 2]}, Text((1, 2))),
    ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
    ({"prompt": [1], "completion": "b", "text": None}, Completion((1,), "b")),
    ({"messages": [USER, ASSISTANT]}, Chat((USER, ASSISTANT))),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}]},
        Chat((USER, ASSISTANT)),
    ),
]
BAD: list[tuple[Any, str]] = [
    ({}, "needs text, prompt and completion, or messages; it has none of them"),
    ({"prompt": "a"}, "needs text, prompt and completion, or messages; it has prompt"),
    ({"completion": "a"}, "it has completion"),
    ({"text": "a", "prompt": "b"}, "it has text, prompt"),
    ({"text": "a", "label": 1}, "unknown field label"),
    ({"text": ""}, "text is empty"),
    ({"text": 5}, "text must be a string or a list of token ids, not 5"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"prompt": [-1], "completion": "a"}, "prompt holds -1, which is not a token id"),
    ({"prompt": "a", "completion": [True]}, "completion holds True"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [USER]}, "messages has no assistant turn"),
    ({"messages": [{"role": "assistant"}]}, "messages[0] has no content"),
    ([], "must be an object, not []"),
]


def written(folder: Path, rows: list[Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_form(tmp_path: Path) -> None:
    path = written(tmp_path, [row for row, _ in GOOD])
    data = read_training_rows(path)
    assert [row.content for row in data.rows] == [content for _, content in GOOD]
    assert [row.line for row in data.rows] == list(range(1, len(GOOD) + 1))
    assert data.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    data.require_valid()


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, said: str) -> None:
    data = read_training_rows(written(tmp_path, [{"text": "fine"}, row]))
    with pytest.raises(InputError) as error:
        data.require_valid()
    first, second = str(error.value).split("\n")
    assert first.endswith("1 of 2 rows invalid: correct them, or leave them out")
    assert second.startswith("  line 2: ")
    assert said in second


def test_lines_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"\n{"text": "\\ud800"}\n{"text": "\xff"}\n{"text": "c"}'
    )
    data = read_training_rows(path)
    assert [row.line for row in data.rows] == [1, 4, 5, 6, 7]
    assert [row.error is None for row in data.rows] == [True, False, False, False, True]
    assert "not JSON" in str(data.rows[1].error)
    assert "surrogate" in str(data.rows[2].error)
    assert "UTF-8" in str(data.rows[3].error)


def test_twenty_bad_rows_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_training_rows(written(tmp_path, [{}] * 25)).require_valid()
    lines = str(error.value).split("\n")
    assert len(lines) == 22
    assert lines[-1] == "  and 5 more"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "no", "no such file"), (tmp_path, "is a folder"), (Path("/dev/null"), "no rows")):
        with pytest.raises(InputError, match=said):
            read_training_rows(path)


def test_objects_are_rows_as_well(tmp_path: Path) -> None:
    data = training_rows(row for row, _ in GOOD)
    assert [row.content for row in data.rows] == [content for _, content in GOOD]
    assert data.digest == training_rows([row for row, _ in GOOD]).digest
    assert data.digest != training_rows([{"text": "abc"}]).digest
    assert "no JSON object" in str(training_rows([{"text": {1}}]).rows[0].error)
    with pytest.raises(InputError, match="holds no rows"):
        training_rows([])
