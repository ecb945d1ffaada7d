"""The report: scenario, instances, tokens, minutes, score, and how long a larger model would take on this machine."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from benchmarks.helm_subset.scenarios import SUBSET, SubScenario
from flexbatch.cli.main import main

_HEADINGS = ("scenario", "instances", "tokens", "minutes", "metric", "score")


def table(found: Sequence[dict[str, Any]], plans: dict[str, float], model: str) -> str:
    """The report as text; ``plans`` has minutes by scenario for ``model``."""
    known = {scenario.name: scenario for scenario in SUBSET}
    rows = [[*_HEADINGS, *([f"{model}, planned min"] if plans else [])]]
    for one in found:
        scenario = known[one["scenario"]]
        row = [scenario.name, str(one["instances"]), str(one["tokens"])]
        row += [f"{one['minutes']:.1f}{'+' if one['resumed'] else ''}", scenario.metric]
        row.append(f"{one['metrics'].get(scenario.metric, float('nan')):.3f}")
        if plans:
            row.append(f"{plans[scenario.name]:.0f}" if scenario.name in plans else "-")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(one["resumed"] for one in found):
        lines.append("+: goes on an earlier run, whose minutes are not counted")
    if plans:
        lines.append(f"{model}: minutes for the instances of HELM's own runs, from flexbatch plan; for a run of all: ")
        lines[-1] += f"{sum(plans.values()):.0f}"
    return "\n".join(lines)


def planned_minutes(scenario: SubScenario, model: str, options: Sequence[str]) -> float:
    """How long flexbatch's plan says that ``model`` takes for the instances of one of HELM's own runs."""
    rows = scenario.full * scenario.outputs
    lengths = ["--prompt-len", str(scenario.prompt_tokens), "--gen-len", str(scenario.new_tokens)]
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = main(["plan", "--model", model, "--json", "--quiet", *lengths, "--num-requests", str(rows), *options])
    if code:
        raise SystemExit(f"flexbatch plan for {model} ended with exit code {code}")
    predicted = json.loads(printed.getvalue())["predicted"]
    return float(rows * scenario.new_tokens / predicted["throughput_tok_s"] / 60)


def draw(path: Path, found: Sequence[dict[str, Any]], title: str) -> bool:
    """Draw scores and minutes as bars; False where matplotlib is not installed."""
    with suppress(ImportError):
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        known = {scenario.name: scenario for scenario in SUBSET}
        names = [one["scenario"] for one in found]
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.2 + 0.5 * len(found)), sharey=True)
        left.barh(names, [one["metrics"].get(known[one["scenario"]].metric, 0.0) for one in found], color="#4477aa")
        left.set_xlim(0, 1)
        left.set_xlabel("score (each scenario's first metric)")
        right.barh(names, [one["minutes"] for one in found], color="#ccbb44")
        right.set_xlabel("minutes")
        for place, one in enumerate(found):
            left.text(0.01, place, known[one["scenario"]].metric, va="center", fontsize=8)
            right.text(0, place, f" {one['tokens']} tokens", va="center", fontsize=8)
        left.invert_yaxis()
        figure.suptitle(title)
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
        return True
    return False
