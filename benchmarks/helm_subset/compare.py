"""Compares two folders of ``run``, such as flexbatch's and ``--baseline``'s: texts by instance, every metric by split.

``python -m benchmarks.helm_subset.compare DIR BASELINE [--output FILE]``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# What depends on who answers, not on what is answered: the Hugging Face client divides by a temperature of 1e-7 before
# it takes log-probabilities, and gives no reason why a text ended.
NOT_COMPARED = ("logprob", "max_prob", "perplexity", "bits_per_byte", "inference_", "finish_reason_")


def runs(folder: Path) -> dict[str, Path]:
    """The runs below a folder by name, whichever suite they are in."""
    return {path.parent.name: path.parent for path in sorted(folder.glob("runs/*/*/scenario_state.json"))}


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """One run answered twice."""
    states = [json.loads((place / "scenario_state.json").read_text(encoding="utf-8")) for place in (ours, theirs)]
    texts = [
        {
            (state["instance"]["id"], state["train_trial_index"]): (
                state["request"]["prompt"],
                [completion["text"].strip() for completion in state["result"]["completions"]],
            )
            for state in run["request_states"]
        }
        for run in states
    ]
    assert set(texts[0]) == set(texts[1])
    values = [_metrics(place) for place in (ours, theirs)]
    names = sorted(set(values[0]) & set(values[1]))
    different = {name: [run[name] for run in values] for name in names if abs(values[0][name] - values[1][name]) > 1e-9}
    return {
        "instances": len(texts[0]),
        "prompts_equal": sum(texts[0][key][0] == texts[1][key][0] for key in texts[0]),
        "texts_equal": sum(texts[0][key][1] == texts[1][key][1] for key in texts[0]),
        "metrics_compared": len(names),
        "metrics_different": different,
        "metrics_of_one_only": sorted(set(values[0]) ^ set(values[1])),
    }


def _metrics(place: Path) -> dict[str, float]:
    found = {}
    for stat in json.loads((place / "stats.json").read_text(encoding="utf-8")):
        name = stat["name"]
        if "mean" in stat and "perturbation" not in name and not name["name"].startswith(NOT_COMPARED):
            found[f"{name['name']} {name.get('split', '')}".strip()] = stat["mean"]
    return found


def main() -> None:
    """Compare all runs that both folders have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    ours, theirs = runs(options.folder), runs(options.baseline)
    both = sorted(set(ours) & set(theirs))
    found = {name: compare(ours[name], theirs[name]) for name in both}
    text = json.dumps(found, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
