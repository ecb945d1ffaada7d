"""Seconds of the policy for one model: all linear programs, one steady sweep simulated layer by layer, and the whole.

    python -m benchmarks.choose_time --output benchmarks/results/choose_time.json

The machine is FlexGen's (the profile ``t4``), the job 10,000 rows of 512+32 tokens. Medians; the parts are timed one
after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexbatch.checkpoint.locate import locate
from flexbatch.cli.plan import shop_of
from flexbatch.options import EngineOptions
from flexbatch.policy.candidates import Shop, realise
from flexbatch.policy.machines import load_profile, machine_of
from flexbatch.policy.search import chosen, ranking, trials_of
from flexbatch.policy.verdict import plan_of, simulated
from flexbatch.policy.workload import Workload


def measure(name: str, bits: int, runs: int) -> dict[str, Any]:
    """Seconds of each part."""
    folder, profile = locate(name, dummy=True), load_profile("t4")
    options = EngineOptions(weight_bits=4 if bits == 4 else 16, kv_bits=4 if bits == 4 else 16)
    machine, workload = machine_of(profile, options, folder.shape.stored_dtype), Workload.uniform(512, 32, 10_000)
    found: dict[str, list[float]] = {"programs": [], "sweep": [], "choose": []}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        found[part].append(time.perf_counter() - started)
        return result

    def shop() -> Shop:
        return shop_of(folder, workload, options, machine, profile)

    def once() -> None:
        one, fresh = shop(), shop()
        timed("programs", lambda: realise(one, trials_of(one, ranking(one))))
        best = chosen(one).candidate
        timed("sweep", lambda: simulated(one, best, most=1_000_000))
        timed("choose", lambda: plan_of(fresh, chosen(fresh)))

    for _ in range(runs):
        once()
    seconds = {part: statistics.median(times) for part, times in found.items()}
    return {"model": name, "bits": bits, **seconds, "programs_and_sweep": seconds["programs"] + seconds["sweep"]}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-175b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = [measure(options.model, bits, options.runs) for bits in (16, 4)]
    text = json.dumps({"runs": options.runs, "seconds": found}, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
