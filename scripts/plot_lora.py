"""Draws throughput over the number of LoRA adapters from what ``benchmarks/lora_scale.py`` wrote.

python scripts/plot_lora.py benchmarks/results/lora_scale.json docs/lora_scale.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

NAMES = {
    "flexbatch": "flexbatch",
    "flexbatch_small_arena": "flexbatch, an arena of 1 GB",
    "peft": "PEFT, mixed batches",
    "merge": "PEFT, merged one by one",
}


def main() -> None:
    """Read a report and write a picture; its type is that of the file's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.report.read_text(encoding="utf-8")), options.picture)


def draw(report: dict[str, Any], picture: Path) -> None:
    """One line a system; the base model alone is the dashed line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for system, label in NAMES.items():
        runs = {int(count): run["tok_s"] for count, run in report.get(system, {}).items() if int(count)}
        if runs:
            counts = sorted(runs)
            axes.plot(counts, [runs[count] for count in counts], marker="o", label=label)
    base = report.get("flexbatch", {}).get("0")
    if base is not None:
        axes.axhline(base["tok_s"], linestyle="--", color="grey", label="flexbatch, base model alone")
    axes.set_xscale("log")
    axes.set_xlabel("adapters that rows choose from")
    axes.set_ylabel("new tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture)


if __name__ == "__main__":
    main()
