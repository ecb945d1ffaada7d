"""A run's figures: the plan in one line, and the stats file. Knows their names, not where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexbatch.cli.backend import EngineLike
from flexbatch.jobs.durable import replace_file

_NOTHING_RUN: dict[str, Any] = {
    "prompt_tokens": 0,
    "completion_tokens": 0,
    "load_s": 0.0,
    "generate_s": 0.0,
    "throughput_tok_s": 0.0,
    "peak_bytes": {},
    "moved_bytes": {},
    "busy_s": {},
    "roofline_s": 0.0,
    "plan": None,
}


def plan_summary(plan: dict[str, Any]) -> str:
    """Return a plan in one line."""

    def percent(shares: dict[str, float]) -> str:
        return "/".join(f"{100 * shares[tier]:.0f}" for tier in ("gpu", "cpu", "disk"))

    placed = ", ".join(f"{name} {percent(plan[name])}" for name in ("weights", "kv", "hidden"))
    sizes = f"{plan['max_sequences']} sequences, micro-batches of {plan['micro_batch_tokens']} tokens"
    return f"plan (% gpu/cpu/disk): {placed}; {plan['dtype']}; {sizes}"


def job_stats(engine: EngineLike | None, *, rows: int, failed: int, resumed: int) -> dict[str, Any]:
    """Return the contract's stats. ``resumed`` rows come from earlier runs; all other figures are of this run alone."""
    counts = {"requests": rows, "completed": rows - failed, "failed": failed, "resumed": resumed}
    return {**counts, **(engine.stats() if engine is not None else _NOTHING_RUN)}


def write_stats(path: Path, stats: dict[str, Any]) -> None:
    """Write stats as JSON. Raises DoesNotFitError on a full disk, UsageError where the file cannot be written."""
    data = (json.dumps(stats, indent=1, allow_nan=False) + "\n").encode()
    replace_file(path, [data], len(data))
