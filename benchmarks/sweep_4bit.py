"""Sweeps with weights in 4 bits against 16, streamed from disk: seconds a sweep, in turns, and what a conversion takes.

    python benchmarks/sweep_4bit.py --model DIR --convert FOLDER                             a conversion
    python benchmarks/sweep_4bit.py --model DIR --packed FOLDER [--rows 4] [--rate 300MB]    sweeps of both

All layers rest on disk, embedding and head in RAM; with ``--no-all-on-disk`` the policy places the weights within
``--cpu-memory``. The page cache is bypassed; ``--rate`` slows the disk down. Every run is a process of its own; the
figure is the median of its decoding sweeps but the first. Results are added to benchmarks/results/sweep_4bit.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flexbatch.units import parse_size

RESULTS = Path(__file__).resolve().parent / "results" / "sweep_4bit.json"


def sweeps(options: argparse.Namespace) -> dict[str, Any]:
    """Inside a process of its own: the sweeps of one run."""
    from flexbatch.checkpoint.locate import locate
    from flexbatch.options import EngineOptions, Resource
    from flexbatch.policy import candidates
    from flexbatch.policy.weights import deal
    from flexbatch.policy.workload import Workload
    from flexbatch.requests import Request, TokenizedRequest
    from flexbatch.runtime.engine import Engine
    from flexbatch.runtime.sweep_runner import SweepRunner
    from flexbatch.sampling import SamplingParams
    from flexbatch.units import Shares

    folder = locate(options.model)
    params = SamplingParams(max_tokens=options.sweeps, ignore_eos=True)
    requests = []
    for row in range(options.rows):
        prompt = tuple((row * 37 + place * 11) % (folder.shape.vocab_size - 10) + 5 for place in range(16))
        requests.append(TokenizedRequest(Request(str(row), params, prompt=prompt), row, prompt))
    rates: dict[Resource, float] = {"disk_read": float(parse_size(options.rate))} if options.rate else {}
    engine_options = EngineOptions(
        device="cpu",
        cpu_memory=parse_size(options.cpu_memory),
        disk_dir=Path(options.disk_dir) if options.disk_dir else None,
        weight_bits=options.bits,
        weights=Shares(0, 0, 1) if options.all_on_disk else None,
        max_sequences=options.rows,
        rates=rates,
    )
    seconds: list[float] = []
    whole = SweepRunner.run

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        found = whole(*arguments, **named)
        seconds.append(time.perf_counter() - started)
        return found

    # Shares are those of the layers here: embedding and head, which no sweep streams for its layers, stay in RAM.
    layers_only = partial(deal, edges="cpu") if options.all_on_disk else deal
    with (
        patch.object(candidates, "deal", layers_only),
        Engine(folder, None, engine_options, Workload.of(requests)) as engine,
    ):
        plan = engine.plan
        with patch.object(SweepRunner, "run", timed):
            done = list(engine.run(requests))
        assert all(result.error is None for result in done)
        stats = engine.stats()
    read = stats["moved_bytes"]["disk_read"]
    return {
        "sweep_s": statistics.median(seconds[2:]),
        "sweeps": len(seconds),
        "disk_share": plan.weights.disk,
        "predicted_s": plan.predicted["sweep_s"],
        "read_bytes": read,
        "weight_bits": plan.weight_bits,
        "busy_s": stats["busy_s"],
    }


def conversion(options: argparse.Namespace) -> dict[str, Any]:
    """Inside a process of its own: convert and say how long it took and how much memory."""
    from flexbatch.cli.main import main as program

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    code = program(["convert", "--model", options.model, "--output", options.convert, "--weight-bits", "4"])
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stored = sum(file.stat().st_size for file in Path(options.model).glob("*.safetensors"))
    return {
        "exit_code": code,
        "seconds": seconds,
        "source_bytes": stored,
        "bytes_per_s": stored / seconds,
        "peak_bytes": 1024 * peak,
        "peak_bytes_before": 1024 * before,
    }


def alone(options: argparse.Namespace, model: str, *more: str) -> dict[str, Any]:
    """Run this file in a process of its own and return what it printed last."""
    command = [sys.executable, __file__, "--model", model, "--rows", str(options.rows)]
    command += ["--sweeps", str(options.sweeps), "--cpu-memory", options.cpu_memory, "--inside", *more]
    command.append("--all-on-disk" if options.all_on_disk else "--no-all-on-disk")
    for name in ("rate", "disk_dir"):
        if getattr(options, name):
            command += [f"--{name.replace('_', '-')}", getattr(options, name)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure in turns, print, and add to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sweeps", type=int, default=6)
    parser.add_argument("--rate", help="bytes a second that the disk gives at most")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--cpu-memory", default="1.6GB")
    parser.add_argument("--disk-dir")
    parser.add_argument("--all-on-disk", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--packed", metavar="FOLDER", help="what --convert wrote; else the cache")
    parser.add_argument("--convert", metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--bits", type=int, default=16, help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(conversion(options) if options.convert else sweeps(options)))
        return
    if options.convert:
        key, found = "conversion", alone(options, options.model, "--convert", options.convert)
    else:
        runs: dict[int, list[dict[str, Any]]] = {16: [], 4: []}
        for _ in range(options.runs):
            for bits, kept in runs.items():
                model = options.packed if options.packed and bits == 4 else options.model
                kept.append(alone(options, model, "--bits", str(bits)))
        seconds = {bits: statistics.median(run["sweep_s"] for run in kept) for bits, kept in runs.items()}
        where = "all layers on disk" if options.all_on_disk else f"{options.cpu_memory} of RAM"
        key = f"{options.rows} rows, disk at {options.rate or 'its own rate'}, {where}"
        found = {
            "sweep_s": seconds,
            "times_as_fast": seconds[16] / seconds[4],
            "last": {bits: kept[-1] for bits, kept in runs.items()},
        }
    print(json.dumps({key: found}, indent=1))
    table: dict[str, Any] = {}
    if options.output.exists():
        table = json.loads(options.output.read_text(encoding="utf-8"))
    options.output.write_text(json.dumps({**table, key: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
