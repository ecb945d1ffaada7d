"""One scenario's rows through ``flexbatch run``: written, run or gone on with, read back. Knows rows, not scenarios."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.cli.main import main

Row = dict[str, Any]


class BatchFailedError(Exception):
    """``flexbatch run`` ended with the exit code ``code``, having said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"flexbatch run ended with exit code {code}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Answers:
    """Results by the id of their row. ``minutes`` are those of the last run; ``resumed``: rows done before it."""

    results: Mapping[str, Row]
    minutes: float
    resumed: int

    @property
    def tokens(self) -> int:
        """Prompt and new tokens of all rows: what was computed, for nothing is padded."""
        return sum(row["prompt_tokens"] + row["completion_tokens"] for row in self.results.values())


def answer(rows: Sequence[Row], stem: Path, model: str, options: Sequence[str]) -> Answers:
    """Run ``rows``; files are named after ``stem``. What an earlier run has done is kept.

    Raises BatchFailedError when the run fails, or some of its rows do.
    """
    source, target, stats = (stem.with_name(f"{stem.name}.{end}") for end in ("rows.jsonl", "out.jsonl", "stats.json"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_rows(source, rows)
    files = ["-i", str(source), "-o", str(target), "--stats", str(stats)]
    code = main(["run", "--model", model, *files, "--logprobs", "0", *options])
    if code:
        raise BatchFailedError(code)
    return read_answers(stem)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read JSONL."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_answers(stem: Path) -> Answers:
    """Read the results of a finished run back."""
    rows = read_rows(stem.with_name(f"{stem.name}.out.jsonl"))
    stats_path = stem.with_name(f"{stem.name}.stats.json")
    stats = json.loads(stats_path.read_text(encoding="utf-8")) if stats_path.exists() else {}
    minutes = (stats.get("load_s", 0.0) + stats.get("generate_s", 0.0)) / 60
    return Answers({row["id"]: row for row in rows}, minutes, stats.get("resumed", 0))
