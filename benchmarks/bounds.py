"""How near sweeps come to what disk, link and products allow, each measured alone in the same process, in turns.

    python benchmarks/bounds.py --model DIR [--kinds disk,compute,balanced] [--runs 3] [--output FILE]

``disk``: all weights on disk, a few rows; the bound is bytes read over the rate of a direct read of the same files.
``compute``: all weights on disk, many rows; the bound is the time of the sweeps' linears alone, on operands of the same
shapes and stored type that no cache holds (so widening counts), plus what attention and head take by their FLOPs.
``balanced``: ``sim`` with disk and link throttled to carry a sweep's weights in just the time that its products take
when they are resident; the bound is that time. The products have one thread, so that copies have a core, as beside a
real GPU. Medians; 1 is the bound, and what is above it is lost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from flexbatch import LLM, SamplingParams
from flexbatch.kernels.linear import linear
from flexbatch.memory.aligned import aligned_buffer
from flexbatch.memory.direct import DirectReader, Extent, plan_reads
from flexbatch.options import Resource
from flexbatch.units import parse_size

_COLD = 256 << 20  # bytes of weights that a timed pass walks over, so that no cache holds them


def prompts_of(rows: int, prompt: int) -> list[list[int]]:
    """Token ids that any vocabulary has."""
    return [[(row * 37 + place * 11) % 1000 + 5 for place in range(prompt)] for row in range(rows)]


def warm(llm: LLM, rows: int, prompt: int) -> None:
    """Load the model and touch the memory that runs of so many rows use."""
    llm.generate(prompts_of(rows, prompt), SamplingParams(max_tokens=2, ignore_eos=True))


def generate(llm: LLM, rows: int, prompt: int, new: int) -> dict[str, Any]:
    """Generate and return what its sweeps took: seconds, bytes by resource, busy seconds."""
    before = llm.stats()
    llm.generate(prompts_of(rows, prompt), SamplingParams(max_tokens=new, ignore_eos=True))
    after = llm.stats()
    seconds = after["generate_s"] - before["generate_s"]
    spent = {
        name: {key: after[name][key] - before[name].get(key, 0) for key in after[name]}
        for name in ("moved_bytes", "busy_s", "step_s")
    }
    flops = {key: after["flops"][key] - before["flops"][key] for key in ("linear", "attention")}
    return {"seconds": seconds, "flops": flops, "rate": after["flops"]["rate"], **spent}


def read_rate(model: Path, limit: float | None) -> float:
    """Bytes/s of one direct read of the checkpoint's files through the reader that runs use, slowed to ``limit``."""
    files = sorted(model.glob("*.safetensors"))
    piece = 64 << 20
    buffer = aligned_buffer(piece + (1 << 20))
    total, seconds = 0, 0.0
    with closing(DirectReader(rate=limit)) as reader:
        for file in files:
            for offset in range(0, file.stat().st_size - piece, piece):
                started = time.perf_counter()
                total += reader.read(plan_reads([Extent(file, offset, piece)]), buffer)
                seconds += time.perf_counter() - started
    return total / seconds


def linear_seconds(model: Path, rows: int, dtype: torch.dtype) -> float:
    """Seconds of the linears of all layers for ``rows`` tokens, operands in ``dtype`` and cold."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = [(heads, hidden), (kv, hidden), (kv, hidden), (hidden, heads), (inner, hidden), (inner, hidden)]
    shapes.append((hidden, inner))
    per_layer = sum(rows_ * columns for rows_, columns in shapes) * dtype.itemsize
    copies = max(2, _COLD // per_layer + 1)
    layers = [[torch.rand(shape).to(dtype) for shape in shapes] for _ in range(copies)]
    inputs = {columns: torch.rand(rows, columns) for _, columns in shapes}
    seconds = []
    with torch.inference_mode():
        for layer in layers * 2:
            started = time.perf_counter()
            q, k, v, out, gate, up, down = layer
            linear(inputs[hidden], [q, k, v])
            linear(inputs[heads], [out])
            linear(inputs[hidden], [gate, up])
            linear(inputs[inner], [down])
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:]) * int(config["num_hidden_layers"])


def disk(options: argparse.Namespace) -> dict[str, Any]:
    """Weights on disk, few rows."""
    found, last = [], {}
    limit = None if options.disk_rate is None else float(parse_size(options.disk_rate))
    rates: dict[Resource, float] = {} if limit is None else {"disk_read": limit}
    with LLM(options.model, device="cpu", weights="0,0,100", disk_dir=options.disk_dir, rates=rates) as llm:
        warm(llm, options.few, 16)
        for _ in range(options.runs):
            before = read_rate(Path(options.model), limit)
            last = generate(llm, options.few, 16, options.few_sweeps)
            rate = (before + read_rate(Path(options.model), limit)) / 2
            found.append((last["seconds"], last["moved_bytes"]["disk_read"] / rate, rate))
    return _report(found, last, options.few)


def compute(options: argparse.Namespace) -> dict[str, Any]:
    """Weights on disk, many rows."""
    found, last = [], {}
    with LLM(
        options.model,
        device="cpu",
        weights="0,0,100",
        disk_dir=options.disk_dir,
        max_sequences=options.many,
        micro_batch=options.many,
    ) as llm:
        warm(llm, options.many, 1)
        stored = getattr(torch, json.loads((Path(options.model) / "config.json").read_text())["torch_dtype"])
        for _ in range(options.runs):
            # Prompts of one token: every sweep carries the same rows.
            before = linear_seconds(Path(options.model), options.many, stored)
            last = generate(llm, options.many, 1, options.sweeps)
            after = linear_seconds(Path(options.model), options.many, stored)
            linears = (before + after) / 2 * options.sweeps
            rest = last["step_s"]["head"]
            found.append((last["seconds"], linears + rest, linears / options.sweeps))
    return _report(found, last, options.many)


def balanced(options: argparse.Namespace) -> dict[str, Any]:
    """``sim``: products, link and disk need the same time."""
    found, last = [], {}
    torch.set_num_threads(1)
    with LLM(options.model, device="sim", gpu_memory="12GiB", weights="100,0,0", kv="100,0,0") as resident:
        warm(resident, options.balanced_rows, 1)
        alone = generate(resident, options.balanced_rows, 1, options.sweeps)["seconds"]
        streamed = sum(file.stat().st_size for file in Path(options.model).glob("*.safetensors")) * options.sweeps
        for _ in range(options.runs):
            rate = streamed / alone
            rates: dict[Resource, float] = {"disk_read": rate, "h2d": rate}
            with LLM(
                options.model, device="sim", gpu_memory="12GiB", weights="0,0,100", kv="100,0,0", rates=rates
            ) as llm:
                warm(llm, options.balanced_rows, 1)
                last = generate(llm, options.balanced_rows, 1, options.sweeps)
            again = generate(resident, options.balanced_rows, 1, options.sweeps)["seconds"]
            moved = last["moved_bytes"]
            bound = max((alone + again) / 2, moved["disk_read"] / rate, moved["h2d"] / rate)
            found.append((last["seconds"], bound, rate))
            alone = again
    return _report(found, last, options.balanced_rows)


def _report(found: list[tuple[float, float, float]], last: dict[str, Any], rows: int) -> dict[str, Any]:
    return {
        "rows": rows,
        "runs": [{"seconds": seconds, "bound_s": bound, "rate": rate} for seconds, bound, rate in found],
        "seconds_over_bound": statistics.median(seconds / bound for seconds, bound, _ in found),
        "last_run": last,
    }


def main() -> None:
    """Run the kinds asked for and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kinds", default="disk,compute,balanced")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--disk-rate", help="bytes/s that a faster disk is slowed to, e.g. 1.2GB")
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--few-sweeps", type=int, default=12)
    parser.add_argument("--many", type=int, default=256)
    parser.add_argument("--balanced-rows", type=int, default=96)
    parser.add_argument("--disk-dir")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for kind in options.kinds.split(","):
        report[kind] = {"disk": disk, "compute": compute, "balanced": balanced}[kind](options)
        print(json.dumps({kind: report[kind]}, indent=1), flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
