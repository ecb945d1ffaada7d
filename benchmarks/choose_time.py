"""Seconds of the policy for one model: all linear programs, one steady sweep simulated layer by layer, and the whole.

    python -m benchmarks.choose_time --output benchmarks/results/choose_time.json

The machine is FlexGen's, the job 10,000 rows of 512+32 tokens. Medians; the parts are timed one after the other.
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
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.options import EngineOptions
from flexbatch.policy.candidates import Shop, realise
from flexbatch.policy.footprint import UnitSize
from flexbatch.policy.machine import Machine
from flexbatch.policy.machines import load_profile
from flexbatch.policy.search import choose, chosen, ranking, trials_of
from flexbatch.policy.verdict import simulated
from flexbatch.policy.workload import Workload
from flexbatch.units import GIB


def measure(name: str, bits: int, runs: int) -> dict[str, Any]:
    """Seconds of each part."""
    shape = locate(name, dummy=True).shape
    table = family_of(shape).table(shape)
    size = model_size(shape, table)
    units = [
        UnitSize(f"{group.prefix}{linear.name}", (index,), 2 * linear.in_features * linear.out_features,
                 linear.in_features * linear.out_features, False)
        for index, group in enumerate(table.layers, 1) for linear in group.linears
    ]  # fmt: skip
    elements = shape.vocab_size * shape.embed_dim
    units.insert(0, UnitSize("embedding", (0, len(table.groups) - 1), 2 * elements, elements, True, True))
    profile = load_profile("t4")
    machine = Machine("gpu", int(15e9), int(200 * GIB), int(1.4e12), "float16")
    options = EngineOptions(weight_bits=4 if bits == 4 else 16, kv_bits=4 if bits == 4 else 16)
    found: dict[str, list[float]] = {"programs": [], "sweep": [], "choose": []}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        found[part].append(time.perf_counter() - started)
        return result

    def once() -> None:
        shop = Shop(name, size, tuple(units), Workload.uniform(512, 32, 10_000), options, machine, profile, "float16")
        timed("programs", lambda: realise(shop, trials_of(shop, ranking(shop))))
        best = chosen(shop).candidate
        timed("sweep", lambda: simulated(shop, best, most=1_000_000))
        timed(
            "choose",
            lambda: choose(name, size, units, Workload.uniform(512, 32, 10_000), options, machine, profile,
                           stored_dtype="float16"),
        )  # fmt: skip

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
