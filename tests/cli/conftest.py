"""A folder with an input file, and the program run in it against a fake model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flexbatch.cli.main import main
from tests.cli.fakes import FakeBackend

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "abc"},
    {"id": "b", "prompt": [100, 101], "max_tokens": 1},
    {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "xyz", "echo": True}},
    {"prompt": "größe \u2028", "logprobs": 0},
    {
        "custom_id": "e",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "hi"}], "logprobs": True},
    },
]
IDS = ["a", "b", "c", "4", "e"]


@dataclass
class Job:
    """``run(*options)`` is ``flexbatch run`` on ``rows.jsonl`` into ``out.jsonl``; it returns the exit code."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    err: str = ""
    out: str = ""
    backend: FakeBackend = field(default_factory=FakeBackend)

    @property
    def input(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def part(self) -> Path:
        return self.folder / "out.jsonl.part"

    def words(self, *options: str) -> list[str]:
        return ["run", "--model", "fake", "-i", str(self.input), "-o", str(self.output), *options]

    def run(self, *options: str, before: Callable[[int], None] | None = None, **backend: Any) -> int:
        return self.main(self.words(*options), before=before, **backend)

    def main(self, words: list[str], before: Callable[[int], None] | None = None, **backend: Any) -> int:
        self.backend = FakeBackend(before=before, **backend)
        code = main(words, self.backend)
        self.out, self.err = self.capture.readouterr()
        return code

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def write(self, *rows: dict[str, Any] | str) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        self.input.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    made = Job(tmp_path / "work", capsys)
    made.write(*ROWS)
    return made
