"""Finetuning a model larger than its memory cap: ours, and PEFT with gradient checkpointing on accelerate's offload.

    python -m benchmarks.finetune_offload make --model DIR       write a random model (bf16) of 2.9 GB
    python -m benchmarks.finetune_offload all --model DIR [--cap 1.5GB] [--disk-read 500MB] [--sizes 2,4,8] ...

One accumulation (forward and backward, no optimizer step) of rank 16 on all linear layers, every token but the first a
target. Every run is a process of its own inside a memory control group of ``--cap`` bytes, page cache included (root
needed). accelerate keeps in RAM what fits and offloads the rest to disk; it is given the part of RAM that lets it live.
Both in fp32 and in bf16 (the type of products; factors are in fp32). ``--sizes`` and ``--their-sizes``: rows of an
accumulation; runs of both systems follow each other in turn, ``--runs`` times all of them. Of the medians of each size
the best one of each system counts, by type and over both. ``--disk-read`` holds the disk to a rate, for both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.out_of_core import in_group
from benchmarks.training import Row, make_llama
from flexbatch.units import parse_size

RANK, ALPHA = 16, 32
SHAPE: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 5376,
    "num_hidden_layers": 46,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 8000,
    "max_position_embeddings": 4096,
}


def make(options: argparse.Namespace) -> None:
    """Write the model in bf16."""
    make_llama(SHAPE, options.model, "bfloat16")


def rows_of(options: argparse.Namespace) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    found: list[list[int]] = torch.randint(3, 8000, (options.rows, options.tokens), generator=generator).tolist()
    return found


def ours(options: argparse.Namespace) -> None:
    """Two accumulations of ours; the second one is timed."""
    from flexbatch.checkpoint.locate import locate
    from flexbatch.finetune.parameters import Parameters
    from flexbatch.finetune.trainer import Trainer
    from flexbatch.options import EngineOptions

    folder = locate(str(options.model))
    parameters = Parameters.create(folder.shape, rank=RANK, alpha=ALPHA, target_modules="all-linear", seed=0)
    memory, dtype = parse_size(options.memory), options.dtype
    engine = EngineOptions(device="cpu", cpu_memory=memory, disk_dir=options.disk_dir, dtype=dtype)
    rows = [Row.of(row) for row in rows_of(options)]
    total = options.rows * options.tokens
    with Trainer(folder, parameters, engine, tokens=total, longest=options.tokens) as trainer:
        for _ in range(2):
            started = time.perf_counter()
            loss = trainer.accumulate(rows, 1 / total)
            seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "loss": loss.total / loss.tokens, "disk": trainer.plan.weights.disk}))


def theirs(options: argparse.Namespace) -> None:
    """Two accumulations of PEFT's; the second one is timed."""
    import transformers
    from peft import LoraConfig, get_peft_model

    warnings.simplefilter("ignore")
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory(dir=options.disk_dir) as folder:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            options.model,
            dtype=dtype,
            device_map="auto",
            max_memory={"cpu": parse_size(options.memory)},
            offload_folder=folder,
        )
        model: Any = get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        )
        _bring_adapters_to_ram(model)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        ids = torch.tensor(rows_of(options))
        for _ in range(2):
            started = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            seconds = time.perf_counter() - started
        placed = getattr(base, "hf_device_map", {})
        disk = sum(place == "disk" for place in placed.values()) / max(1, len(placed))
        print(json.dumps({"seconds": seconds, "loss": float(loss.detach()), "disk": disk}))


def _bring_adapters_to_ram(model: Any) -> None:
    """PEFT puts adapters where their layers are: on the meta device, where none trains, if those are offloaded."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if layer.lora_A["default"].weight.is_meta:
            layer.lora_A["default"].to_empty(device="cpu")
            layer.lora_B["default"].to_empty(device="cpu")
            layer.reset_lora_parameters("default", init_lora_weights=True)


def one(options: argparse.Namespace) -> None:
    """One system in this process."""
    if options.system == "ours":
        ours(options)
    else:
        theirs(options)


def everything(options: argparse.Namespace) -> None:
    """All systems and sizes in turn, each in a process with the cap."""
    results: list[dict[str, Any]] = []
    sizes = {"ours": options.sizes.split(","), "PEFT": (options.their_sizes or options.sizes).split(",")}
    for run in range(options.runs):
        for place in range(max(map(len, sizes.values()))):
            for dtype, system in itertools.product(options.dtypes.split(","), sizes):
                if place < len(sizes[system]):
                    found = {"run": run, **_measured(options, system, dtype, int(sizes[system][place]))}
                    print(found, file=sys.stderr, flush=True)
                    results.append(found)
    by_size: dict[tuple[str, str, int], list[float]] = {}
    for each in results:
        rates = by_size.setdefault((each["system"], each["dtype"], each["rows"]), [])
        rates.append(each.get("tokens_per_s", 0.0))
    best: dict[tuple[str, str], float] = {}
    for (system, dtype, _), rates in by_size.items():
        for kind in (dtype, "either"):
            best[system, kind] = max(best.get((system, kind), 0.0), statistics.median(rates))
    kinds = (*options.dtypes.split(","), "either")
    report = {
        "what": "tokens per second of one accumulation of LoRA finetuning under a memory cap",
        "cap": options.cap,
        "disk_read": options.disk_read,
        "tokens": options.tokens,
        "shape": SHAPE,
        "threads": torch.get_num_threads(),
        "results": results,
        "ratio": {kind: best["ours", kind] / best["PEFT", kind] if best["PEFT", kind] else None for kind in kinds},
    }
    print(json.dumps(report, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def _measured(options: argparse.Namespace, system: str, dtype: str, rows: int) -> dict[str, Any]:
    """One run of one system in a process with the cap."""
    memory = options.our_memory if system == "ours" else options.their_memory
    command = [sys.executable, "-m", "benchmarks.finetune_offload", "one", "--model", str(options.model)]
    command += ["--system", system, "--dtype", dtype, "--memory", memory]
    command += ["--rows", str(rows), "--tokens", str(options.tokens)]
    code, out, err, _ = in_group(
        [*command, "--disk-dir", str(options.disk_dir)],
        parse_size(options.cap),
        folder=options.model,
        read_rate=None if options.disk_read is None else parse_size(options.disk_read),
        seconds=options.limit,
    )
    found: dict[str, Any] = {"system": system, "dtype": dtype, "rows": rows, "exit_code": code}
    if code == 0:
        found |= json.loads(out.strip().splitlines()[-1])
        found["tokens_per_s"] = rows * options.tokens / found["seconds"]
    else:
        found["error"] = err.strip().splitlines()[-1:] if err.strip() else []
    return found


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("make", "all", "one"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cap", default="1.5GB")
    parser.add_argument("--our-memory", default="950MB")
    parser.add_argument("--their-memory", default="50MB")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--disk-read", help="hold the disk to so many bytes a second, for both (default: as it is)")
    parser.add_argument("--sizes", default="1,2,4")
    parser.add_argument("--their-sizes", help="rows of PEFT's accumulations (default: as ours)")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run is given up")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--disk-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--system", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    {"make": make, "all": everything, "one": one}[options.command](options)


if __name__ == "__main__":
    main()
