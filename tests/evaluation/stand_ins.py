"""Small files in the form of the data sets that HELM downloads, for a machine without a network.

They stand where ``SubScenario.data`` says that the real ones belong. What they ask is made up; only their form is real.
"""

from __future__ import annotations

import csv
import json
import pickle
import random
from pathlib import Path

from benchmarks.helm_subset.scenarios import SUBSET

_NAMES = ("Alder", "Birch", "Cedar", "Dunlin", "Elm", "Fulmar", "Gannet", "Heron", "Iris", "Jay", "Kestrel", "Lark")
_KINDS = ("human", "village", "river", "film", "album", "mountain", "painting", "asteroid")
_TEXT = Path(__file__).parents[2] / "benchmarks" / "prompts.txt"


def write(folder: Path) -> None:
    """Write all of them below ``folder``, HELM's output folder."""
    rng = random.Random(0)
    for place in {file.place for scenario in SUBSET for file in scenario.data}:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if "wikifact" in place:
            path.write_text("".join(json.dumps(row) + "\n" for row in _facts(rng, 40)), encoding="utf-8")
        elif "mmlu" in place:
            for split, count in (("dev", 5), ("val", 8), ("test", 30)):
                (path / split).mkdir(parents=True, exist_ok=True)
                for subject in ("abstract_algebra", "us_foreign_policy"):
                    with (path / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as stream:
                        csv.writer(stream).writerows(_question(rng) for _ in range(count))
        else:
            words = _TEXT.read_text(encoding="utf-8").split()
            splits = {"train": 20, "validation": 10, "test": 30}
            with path.open("wb") as stream:
                pickle.dump({name: [_article(rng, words) for _ in range(n)] for name, n in splits.items()}, stream)


def _facts(rng: random.Random, count: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for _ in range(count):
        one, other, kind = rng.choice(_NAMES), rng.choice(_NAMES), rng.choice(_KINDS)
        found.append({"property": "P31", "template": f"{one} {other} is an instance of", "result_names": [[kind]]})
        found.append(
            {"property": "P1620", "template": f"The plaintiff of {one} v. {other} is", "result_names": [[one]]}
        )
    return found


def _question(rng: random.Random) -> list[str]:
    left, right, modulus = rng.randrange(2, 30), rng.randrange(2, 30), rng.choice([5, 7, 11, 13])
    answer = left * right % modulus
    options = rng.sample([value for value in range(modulus + 4) if value != answer], 3)
    place = rng.randrange(4)
    options.insert(place, answer)
    return [f"What is {left} times {right} modulo {modulus}?", *map(str, options), "ABCD"[place]]


def _article(rng: random.Random, words: list[str]) -> dict[str, str]:
    start = rng.randrange(len(words) - 200)
    text = words[start : start + rng.randrange(60, 140)]
    return {"document": " ".join(text), "summary": " ".join(text[:14])}
