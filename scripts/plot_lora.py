"""Draws throughput over the number of LoRA adapters from what ``benchmarks/lora_scale.py`` wrote.

python scripts/plot_lora.py benchmarks/results/lora_scale.json docs/lora_scale.svg [--label LABEL]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

NAMES = {
    "flexbatch": "flexbatch",
    "peft": "PEFT, mixed batches",
    "merge": "PEFT, merged one by one",
}


def main() -> None:
    """Read a report and write a picture; its type is that of the file's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--label", default="turns", help="the name of the figures in the report")
    options = parser.parse_args()
    draw(json.loads(options.report.read_text(encoding="utf-8"))[options.label], options.picture)


def draw(runs: dict[str, Any], picture: Path) -> None:
    """One line a system; the base model alone, as it was measured beside each count, is dashed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    counts = sorted((int(count) for count in runs), key=int)
    base = [(count, runs[str(count)]["tok_s"]["base"]) for count in counts if "base" in runs[str(count)]["tok_s"]]
    if base:
        axes.plot(*zip(*base, strict=True), linestyle="--", color="grey", label="flexbatch, base model alone")
    for system, label in NAMES.items():
        own = [(count, runs[str(count)]["tok_s"][system]) for count in counts if system in runs[str(count)]["tok_s"]]
        if own:
            axes.plot(*zip(*own, strict=True), marker="o", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("adapters that rows choose from")
    axes.set_ylabel("new tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture)


if __name__ == "__main__":
    main()
