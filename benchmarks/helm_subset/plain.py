"""The scenarios that need no download, without HELM: prompts as flexbatch's rows, and scores of what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.helm_subset.batch import Row, read_answers, read_rows, write_rows
from benchmarks.helm_subset.metrics import METRICS
from benchmarks.helm_subset.prompts import prompted
from benchmarks.helm_subset.scenarios import SubScenario
from benchmarks.helm_subset.synthetic import GENERATORS


def prepare(scenario: SubScenario, folder: Path, tokenizer: Any, window: int, most: int | None) -> list[Row]:
    """Write ``NAME.rows.jsonl`` for ``flexbatch run`` and ``NAME.gold.jsonl`` with the right answers; return the rows.

    ``window`` bounds the prompts, in tokens of ``tokenizer``; ``most`` is how many instances are taken (None: all).
    """
    assert scenario.style is not None
    folder.mkdir(parents=True, exist_ok=True)
    made = prompted(GENERATORS[scenario.name](), scenario.style, tokenizer, window, most)
    rows = [
        {
            "id": f"id{one.number}",
            "prompt": one.prompt,
            "max_tokens": scenario.style.max_tokens,
            "temperature": 0.0,
            "stop": list(scenario.style.stop),
        }
        for one in made
    ]
    gold = [{"id": f"id{one.number}", "answer": one.instance.answer, "split": one.instance.split} for one in made]
    write_rows(folder / f"{scenario.name}.rows.jsonl", rows)
    write_rows(folder / f"{scenario.name}.gold.jsonl", gold)
    return rows


def score(scenario: SubScenario, folder: Path) -> dict[str, Any]:
    """Score ``NAME.out.jsonl``: the mean of every metric over all instances, and over each split."""
    gold = read_rows(folder / f"{scenario.name}.gold.jsonl")
    answers = read_answers(folder / scenario.name)
    splits = sorted({str(row["split"]) for row in gold})
    found: dict[str, Any] = {
        "scenario": scenario.name,
        "instances": len(gold),
        "tokens": answers.tokens,
        "minutes": answers.minutes,
        "resumed": answers.resumed,
        "metrics": _means(scenario.metrics, gold, answers.results),
    }
    found["splits"] = {
        split: _means(scenario.metrics, [row for row in gold if row["split"] == split], answers.results)
        for split in splits
    }
    return found


def _means(names: Sequence[str], gold: Sequence[Row], results: Any) -> dict[str, float]:
    texts = [(row["answer"], results[row["id"]]["text"].strip()) for row in gold]
    return {name: sum(METRICS[name](*pair) for pair in texts) / max(1, len(texts)) for name in names}
