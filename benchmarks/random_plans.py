"""Whether plans keep their budgets: random feasible ones, each run in a control group that ends it if it does not.

    python -m benchmarks.random_plans --model DIR [--plans 30] [--seed 0] [--disk-dir DIR] [--output FILE]

Draws budgets, shares, sizes, schedules and rows; what does not fit (exit code 4 before anything runs) is drawn again.
A group's limit is the plan's ``--cpu-memory`` plus what importing torch and transformers takes plus ``--slack``, page
cache included; a GPU played in RAM has its own budget, added to that. Needs root. Exit code 1 if any run was killed,
failed, or used more of any tier than its budget.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory_cap import imports
from benchmarks.out_of_core import in_group
from flexbatch.units import MIB, parse_size


def shares(rng: random.Random, gpu: bool) -> str:
    """Random percentages of the tiers, now and then nothing on one."""
    parts = [rng.choice([0, rng.randint(1, 100)]) if place or gpu else 0 for place in range(3)]
    total = sum(parts)
    if total == 0:
        return "0,100,0"
    first, second = round(100 * parts[0] / total), round(100 * parts[1] / total)
    return f"{first},{second},{100 - first - second}" if first + second <= 100 else f"{first},{100 - first},0"


def drawn(rng: random.Random, size: int) -> tuple[dict[str, str], list[tuple[int, int]]]:
    """Options of a run, and its rows as (prompt, new tokens); ``size``: the checkpoint's bytes."""
    gpu = rng.random() < 0.5
    options = {"--device": "sim" if gpu else "cpu", "--cpu-memory": f"{int(size * rng.uniform(0.3, 2.5)) // MIB}MiB"}
    if gpu:
        options["--gpu-memory"] = f"{int(size * rng.uniform(0.3, 1.5)) // MIB}MiB"
    for name in ("--weights", "--kv", "--hidden"):
        if rng.random() < 0.5:
            options[name] = shares(rng, gpu)
    if gpu and rng.random() < 0.4:
        options["--cpu-attention"] = rng.choice(["on", "off"])
    if rng.random() < 0.5:
        options["--max-sequences"] = str(rng.randint(1, 40))
    if rng.random() < 0.3:
        options["--schedule"] = "block"
    if rng.random() < 0.5:
        options["--micro-batch"] = str(rng.randint(1, 8) if "--schedule" in options else rng.randint(1, 300))
    longest = rng.choice([20, 100, 700])
    rows = [(rng.randint(1, longest), rng.randint(1, 6)) for _ in range(rng.randint(1, 40))]
    return options, rows


def tried(options: dict[str, str], rows: list[tuple[int, int]], base: int, arguments: argparse.Namespace) -> Any:
    """One run in its group: None if nothing fits, else its report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
            for number, (prompt, new) in enumerate(rows):
                tokens = [(number * 37 + place * 11) % 1000 + 5 for place in range(prompt)]
                stream.write(json.dumps({"prompt": tokens, "max_tokens": new}) + "\n")
        stats = folder / "stats.json"
        command = [sys.executable, "-m", "flexbatch", "run", "--model", arguments.model, "--quiet", "--ignore-eos"]
        command += ["-i", str(folder / "rows.jsonl"), "-o", str(folder / "out.jsonl"), "--stats", str(stats)]
        command += ["--disk-dir", arguments.disk_dir, *(word for pair in options.items() for word in pair)]
        budgets = [parse_size(options[name]) for name in ("--cpu-memory", "--gpu-memory") if name in options]
        limit = base + sum(budgets) + parse_size(arguments.slack)
        code, _, err, peak = in_group(command, limit)
        if code == 4 and not (folder / "out.jsonl.part").exists():
            return None
        report: dict[str, Any] = {
            "options": options,
            "rows": len(rows),
            "limit": limit,
            "exit_code": code,
            "kernel_peak": peak,
        }
        if code:
            return {**report, "error": err.strip()[-300:]}
        found = json.loads(stats.read_text(encoding="utf-8"))
        report |= {"peak_bytes": found["peak_bytes"], "completed": found["completed"]}
        if "--gpu-memory" in options and found["peak_bytes"]["gpu"] > budgets[1]:
            report["error"] = "the GPU's budget was exceeded"
        return report


def main() -> None:
    """Run them all and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slack", default="150MB")
    parser.add_argument("--disk-dir", default=tempfile.gettempdir())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    size = sum(file.stat().st_size for file in Path(arguments.model).glob("*.safetensors"))
    base = imports()
    reports: list[dict[str, Any]] = []
    refused = 0
    while len(reports) < arguments.plans:
        report = tried(*drawn(rng, size), base, arguments)
        if report is None:
            refused += 1
            continue
        reports.append(report)
        print(json.dumps(report), flush=True)
    bad = [report for report in reports if "error" in report]
    print(f"{len(reports)} plans ran, {len(bad)} of them not as promised; {refused} did not fit", file=sys.stderr)
    if arguments.output:
        found = {"plans": reports, "refused": refused, "imports": base}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
