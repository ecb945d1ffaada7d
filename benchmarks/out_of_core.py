"""A model larger than its memory cap, against accelerate's disk offload: the same rows, cap and threads, in turns.

    python benchmarks/out_of_core.py --model DIR --cap 2.5GB [--rows 16] [--prompt-len 16] [--gen-len 48] [--runs 2]

Every run is a process of its own inside a memory control group of ``--cap`` bytes, page cache included (root needed,
control groups version 1 or 2). accelerate is given the share of the model that fits and its disk offload for the rest,
in fp32 and in bf16, and the better counts; it is timed per step, on ``--peer-steps`` steps, since it repeats the same
work every step. The median step of each counts, medians of the runs; ratios are what to read. ``whole_job``: ours with
prompts and slow sweeps included, against a peer whose prompts cost no more than a step. ``of_plan``: the plan's
seconds over ours; ``of_operations``: those of the products' operations alone, at the measured rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from flexbatch.units import parse_size

_V1 = Path("/sys/fs/cgroup/memory")


class Ended(NamedTuple):
    """How a command ended; ``peak``: the most bytes that the kernel charged to it, page cache included."""

    code: int
    out: str
    err: str
    peak: int


def in_group(
    command: list[str],
    cap: int,
    *,
    folder: str | Path = "/",
    read_rate: int | None = None,
    seconds: float | None = None,
) -> Ended:
    """Run ``command`` under a memory cap, and with the disk that holds ``folder`` held to ``read_rate`` bytes/s.

    It is killed after so many ``seconds``.
    """
    name = f"flexbatch-bench-{os.getpid()}"
    if _V1.is_dir():
        group, disk = _V1 / name, Path("/sys/fs/cgroup/blkio") / name
        limit, member, most = (group / file for file in ("memory.limit_in_bytes", "tasks", "memory.max_usage_in_bytes"))
        throttle, rule = disk / "blkio.throttle.read_bps_device", f"{_disk_of(folder)} {read_rate}"
        groups = [group] if read_rate is None else [group, disk]
    else:
        group = Path("/sys/fs/cgroup") / name
        limit, member, most = (group / file for file in ("memory.max", "cgroup.procs", "memory.peak"))
        throttle, rule = group / "io.max", f"{_disk_of(folder)} rbps={read_rate}"
        groups = [group]
    for each in groups:
        each.mkdir(exist_ok=True)
    limit.write_text(str(cap))
    if read_rate is not None:
        throttle.write_text(rule)

    def join() -> None:
        for each in groups:
            (each / member.name).write_text(str(os.getpid()))

    try:
        try:
            done = subprocess.run(command, capture_output=True, text=True, preexec_fn=join, timeout=seconds)
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(command, -9, "", f"not done after {seconds} seconds")
        peak = int(most.read_text())
    finally:
        time.sleep(0.5)
        for each in groups:
            each.rmdir()
    return Ended(done.returncode, done.stdout, done.stderr, peak)


def _disk_of(folder: str | Path) -> str:
    """The numbers ``major:minor`` of the disk that a folder lies on; of a partition, those of the whole."""
    device = Path(folder).stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    known = Path("/sys/dev/block") / numbers
    return (known.resolve().parent / "dev").read_text().strip() if (known / "partition").exists() else numbers


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """One run of ``flexbatch run``; its stats."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        with rows.open("w", encoding="utf-8") as stream:
            for row in range(options.rows):
                prompt = [(row * 37 + place * 11) % 1000 + 5 for place in range(options.prompt_len)]
                stream.write(json.dumps({"id": str(row), "prompt": prompt, "max_tokens": options.gen_len}) + "\n")
        stats = Path(folder) / "stats.json"
        command = [sys.executable, "-m", "flexbatch", "run", "--model", options.model, "--input", str(rows)]
        command += ["--output", f"{folder}/out.jsonl", "--stats", str(stats), "--ignore-eos", "--quiet"]
        command += ["--device", "cpu", "--disk-dir", options.disk_dir, *options.extra]
        if options.cpu_memory:
            command += ["--cpu-memory", options.cpu_memory]
        if options.trace:
            command += ["--trace", options.trace]
        code, _, err, _ = in_group(command, parse_size(options.cap))
        if code:
            raise SystemExit(f"flexbatch ended with {code}: {err.strip()[-600:]}")
        report: dict[str, Any] = json.loads(stats.read_text(encoding="utf-8"))
        return report


def theirs(options: argparse.Namespace, dtype: str, fraction: float) -> float | None:
    """Seconds a step of accelerate's disk offload takes, or None if it was killed."""
    command = [sys.executable, __file__, "--peer", dtype, "--fraction", str(fraction)]
    for name in ("model", "rows", "prompt_len", "peer_steps", "disk_dir"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    code, out, err, _ = in_group(command, parse_size(options.cap))
    if code:
        print(f"accelerate {dtype}: ended with {code}: {err.strip()[-200:]}", file=sys.stderr)
        return None
    return float(out.strip().splitlines()[-1])


def peer(options: argparse.Namespace) -> None:
    """Inside the control group: accelerate's disk offload; prints the median seconds of a decoding step."""
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, options.peer)
    config = AutoConfig.from_pretrained(options.model)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    with tempfile.TemporaryDirectory(dir=options.disk_dir) as folder:
        model = load_checkpoint_and_dispatch(
            model,
            options.model,
            device_map="auto",
            max_memory={"cpu": int(options.fraction * weights)},
            offload_folder=folder,
            dtype=dtype,
            no_split_module_classes=[type(model.model.layers[0]).__name__],
        )
        ids = torch.randint(5, 1000, (options.rows, options.prompt_len))
        cache = None
        seconds = []
        with torch.inference_mode():
            for _ in range(options.peer_steps + 1):
                started = time.perf_counter()
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                seconds.append(time.perf_counter() - started)
    print(statistics.median(seconds[1:]))


def main() -> None:
    """Run both in turns and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cap", default="2.5GB")
    parser.add_argument("--cpu-memory")
    parser.add_argument("--disk-dir", default=tempfile.gettempdir())
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--gen-len", type=int, default=48)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--peer-steps", type=int, default=3)
    parser.add_argument("--trace")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--fraction", type=float, default=0.3, help=argparse.SUPPRESS)
    options, extra = parser.parse_known_args()
    options.extra = extra
    if options.peer:
        peer(options)
        return
    stats: list[dict[str, Any]] = []
    steps: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for _ in range(options.runs):
        stats.append(ours(options))
        if not options.no_peer:
            for dtype in steps:
                # What it may keep in RAM beside the process and one layer on its way; less than this and it is killed.
                step = theirs(options, dtype, 0.12 if dtype == "float32" else 0.35)
                if step is not None:
                    steps[dtype].append(step)
    step_s = statistics.median(one["sweep_s"] for one in stats)
    mean_s = statistics.median(one["generate_s"] / options.gen_len for one in stats)
    peers = {dtype: statistics.median(values) for dtype, values in steps.items() if values}
    report = {
        "cap": options.cap,
        "rows": options.rows,
        "prompt_len": options.prompt_len,
        "gen_len": options.gen_len,
        "flexbatch_step_s": step_s,
        "flexbatch_tok_s": statistics.median(one["throughput_tok_s"] for one in stats),
        "accelerate_step_s": peers,
        "ratio": min(peers.values()) / step_s if peers else None,
        "whole_job": min(peers.values()) / mean_s if peers else None,
        "of_plan": statistics.median(one["plan"]["predicted"]["job_s"] / one["generate_s"] for one in stats),
        "of_operations": statistics.median(one["roofline_s"] / one["generate_s"] for one in stats),
        "stats": stats[-1],
    }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
