"""Throughput over the number of LoRA adapters: ours, PEFT's mixed batches, and merging one adapter after the other.

    python benchmarks/lora_scale.py make --model DIR --adapters DIR [--count 1000]     write random adapters
    python benchmarks/lora_scale.py turns --model DIR --adapters DIR --counts 5,100 --systems flexbatch,peft,merge
    python benchmarks/lora_scale.py first --model DIR --adapters DIR --counts 5,1000    a process's first job
    python benchmarks/lora_scale.py open --model DIR --adapters DIR                     time to open all of them
    python benchmarks/lora_scale.py memory --model DIR --adapters DIR --counts 2000 --adapter-memory 1GB

As in S-LoRA's table: ranks 8, 16, 32 and 64 on q, k, v and o, a random adapter for each of 256 rows of 64 prompt and 32
new tokens, on the CPU (ours also on ``--device``) in ``--dtype`` (PEFT's adapters too). ``turns`` runs all systems in
turn, ``--rounds`` times at each count, always with our base model alone as well, so that a machine whose rate drifts
favours nobody; figures are medians. Ours reads its adapters in every round (two sets take turns), into memory that is
not new; PEFT, in a process of its own, has its adapters loaded before and has made one batch. ``--budget`` seconds are
what a system may take at one count, though it runs once at least. ``extra_s`` is what the products of the adapters and
one pass over the factors for every decoding row cost at rates measured in the same process; ``to_cost`` what base model
and that take, over what was taken; ``kernel_s`` are seconds of the operating system. Figures are added to those of
other counts in ``--output``.

``first`` runs each count in a process of its own (``one``), whose memory is new to it. ``memory`` runs the base model,
then one count; ``grown`` is what the process has come to hold beyond what it held after the base model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.lora_peers import Names, Peer, Prompts
from flexbatch import LLM, SamplingParams

RANKS = (8, 16, 32, 64)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make(options: argparse.Namespace) -> None:
    """Write ``--count`` adapters with random fp16 factors; the ranks take turns."""
    config = json.loads((Path(options.model) / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    out = {"q_proj": heads * head, "o_proj": hidden}
    out |= dict.fromkeys(("k_proj", "v_proj"), config.get("num_key_value_heads", heads) * head)
    into = {name: heads * head if name == "o_proj" else hidden for name in TARGETS}
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**24, generator=generator).half()
    for number in range(options.count):
        folder = options.adapters / f"a{number}"
        if (folder / "adapter_model.safetensors").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rank = RANKS[number % len(RANKS)]
        tensors = {}
        place = number * 7919
        for layer in range(config["num_hidden_layers"]):
            for name in TARGETS:
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                for side, shape in (("A", (rank, into[name])), ("B", (out[name], rank))):
                    count = math.prod(shape)
                    place = (place + count) % (pool.numel() - count)
                    scale = 0.3 / math.sqrt(shape[1])
                    tensors[f"{prefix}.lora_{side}.weight"] = (pool[place : place + count] * scale).view(shape)
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
        settings |= {"target_modules": list(TARGETS), "base_model_name_or_path": options.model, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))


def work(options: argparse.Namespace, count: int, vocab: int) -> tuple[Prompts, Names]:
    """Prompts of random tokens, and the adapter of each."""
    rng = random.Random(count)
    prompts = [[rng.randrange(1000, vocab) for _ in range(options.prompt)] for _ in range(options.rows)]
    return prompts, [f"a{rng.randrange(count)}" if count else None for _ in range(options.rows)]


def others(options: argparse.Namespace, names: Names) -> Names:
    """As many adapters for as many rows, or somewhat more, none of them among ``names``."""
    used = set(names)
    if used == {None}:
        return names
    free = [name for number in range(10_000) if (name := f"a{number}") not in used]
    there = [name for name in free if (options.adapters / name).is_dir()]
    count = min(len(names), len(used) + len(used) // 8 + 1, len(there))
    return [there[row % count] for row in range(len(names))]


def open_llm(options: argparse.Namespace) -> LLM:
    """Ours, with all adapters at hand."""
    names = ("device", "gpu_memory", "cpu_memory", "dtype", "weight_bits", "dummy_weights", "adapter_memory")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    return LLM(options.model, lora_dir=options.adapters, **settings)


def turns(options: argparse.Namespace, llm: LLM, count: int) -> dict[str, Any]:
    """All systems with ``count`` adapters, in turn; seconds of every run, and medians."""
    prompts, names = work(options, count, _vocab(options))
    params = SamplingParams(max_tokens=options.new, ignore_eos=True)
    sets = others(options, names), names
    rows: dict[str, int] = {}

    seconds: dict[str, list[float]] = {}
    kernel: dict[str, list[float]] = {}

    def ours(names: Names) -> tuple[float, float]:
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
        results = llm.generate(prompts, params, lora=list(names))
        assert all(result.completion_tokens == options.new for result in results)
        return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_stime - before

    def mixed(**more: int) -> tuple[float, float]:
        assert peer is not None
        taken, inside = peer.call("mixed", **rows_of_all, batch=batch, **more)
        return float(taken), inside

    def merged() -> tuple[float, float]:
        assert peer is not None
        (taken, rows["merge"]), inside = peer.call("merged", **rows_of_all, most=options.merges)
        return float(taken), inside

    def own_turn() -> tuple[float, float]:
        return ours(sets[len(seconds["flexbatch"]) % 2])

    rows_of_all = {"prompts": prompts, "names": names}
    runs: dict[str, Callable[[], tuple[float, float]]] = {}
    expected: dict[str, float] = {}
    batch = options.sizes[0]
    with contextlib.ExitStack() as stack:
        peer: Peer | None = None
        if {"peft", "merge"} & set(options.systems):
            fixed = {"dtype": options.dtype, "new": options.new, "keeps": options.peft_memory == "kept"}
            peer = stack.enter_context(Peer(options.model, options.adapters, names, **fixed))
            if "peft" in options.systems and len(options.sizes) > 1:
                expected, _ = peer.call("by_batch", **rows_of_all, sizes=options.sizes, new=options.trial)
                batch = int(min(expected, key=lambda size: expected[size]))
        if "flexbatch" in options.systems:
            for warm in sets:  # memory is new: not counted, and neither is PEFT's first round
                ours(warm)
            runs = {"base": lambda: ours([None] * len(prompts)), "flexbatch": own_turn}
        if "peft" in options.systems:
            mixed(new=2)
            runs["peft"] = mixed
        if "merge" in options.systems:
            runs["merge"] = merged
        for _ in range(options.rounds):
            for system, run in runs.items():
                spent = seconds.setdefault(system, [])
                if not spent or sum(spent) + spent[-1] <= options.budget:
                    taken, inside = run()
                    spent.append(taken)
                    kernel.setdefault(system, []).append(inside)
                    print(f"{count} adapters, {system}: {taken:.1f} s", file=sys.stderr, flush=True)
    middle = {system: statistics.median(each) for system, each in seconds.items()}
    found: dict[str, Any] = {
        "distinct": len(set(names) - {None}),
        "seconds": seconds,
        "kernel_s": kernel,
        "tok_s": {system: rows.get(system, len(prompts)) * options.new / each for system, each in middle.items()},
    }
    if "peft" in runs:
        found |= {"peft_batch": batch, "peft_memory": options.peft_memory, "peft_expected_s_by_batch": expected}
    if rows:
        found["merged_rows"] = rows["merge"]
    if "flexbatch" in middle:
        found["to_base"] = middle["base"] / middle["flexbatch"]
    if "flexbatch" in middle and options.device == "cpu":
        found["extra_s"] = adapter_seconds(options, names)
        found["to_cost"] = (middle["base"] + found["extra_s"]) / middle["flexbatch"]
    if {"flexbatch", "peft"} <= set(middle):
        found["to_peft"] = middle["peft"] / middle["flexbatch"]
        pairs = zip(seconds["peft"], seconds["flexbatch"], strict=False)
        found["to_peft_by_round"] = [theirs / own for theirs, own in pairs]
    return found


def adapter_seconds(options: argparse.Namespace, names: Names) -> float:
    """What adapters cost at measured rates, in seconds.

    Prompts' products in fp32 and, for each new token, a pass over the factors in their files' 16 bits. The first one
    comes with the prompt.
    """
    if not any(names):
        return 0.0
    numbers = torch.ones(2**26)  # written: pages that never were are all one, and come from a cache
    read = statistics.median(_timed(numbers.sum) for _ in range(15)) / numbers.nbytes
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    flop = statistics.median(_timed(lambda: a @ b) for _ in range(15)) / (2 * 1024**3)
    files = [options.adapters / str(name) / "adapter_model.safetensors" for name in names]
    elements = sum(file.stat().st_size / 2 for file in files)
    return float(elements * (2 * read * (options.new - 1) + 2 * flop * options.prompt))


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def first(options: argparse.Namespace, counts: list[int]) -> dict[str, Any]:
    """Seconds of a process's first job with each of ``counts``, in turn, one process after the other."""
    same: tuple[str, ...] = (
        "model",
        "adapters",
        "rows",
        "prompt",
        "new",
        "dtype",
        "cpu_memory",
        "device",
        "weight_bits",
    )
    same += tuple(name for name in ("adapter_memory", "gpu_memory") if getattr(options, name))
    passed = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in same]
    passed += ["--dummy-weights"] if options.dummy_weights else []
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(options.rounds):
        for count in counts:
            command = [sys.executable, "-m", "benchmarks.lora_scale", "one", *passed, f"--counts={count}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds[count].append(float(done.stdout.splitlines()[-1]))
    tok_s = {count: options.rows * options.new / statistics.median(each) for count, each in seconds.items()}
    return {"seconds": seconds, "tok_s": tok_s}


def one(options: argparse.Namespace, count: int) -> float:
    """Seconds of this process's first job; the plan is made and the weights are loaded before."""
    prompts, names = work(options, count, _vocab(options))
    with open_llm(options) as llm:
        llm.generate(prompts[:1], SamplingParams(max_tokens=1))
        params = SamplingParams(max_tokens=options.new, ignore_eos=True)
        return _timed(lambda: llm.generate(prompts, params, lora=list(names)))


def memory(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """What the arena is, what the process grew by in two jobs, and what those read from disk, in bytes."""
    prompts, names = work(options, count, _vocab(options))
    params, process = SamplingParams(max_tokens=options.new, ignore_eos=True), psutil.Process()
    grown: list[int] = []
    with open_llm(options) as llm:
        for _ in range(2):  # twice: the second one keeps what the first one freed
            llm.generate(prompts, params)
        before = process.memory_info().rss
        for _ in range(2):
            results = llm.generate(prompts, params, lora=list(names))
            assert all(result.completion_tokens == options.new for result in results)
            grown.append(process.memory_info().rss - before)
        figures = llm.stats()["adapters"]
    kept = ("arena_bytes", "arena_peak_bytes", "arena_fragmentation", "reads", "evictions", "waits", "bytes_read")
    return {"distinct": len(set(names)), "grown": grown, **{name: figures[name] for name in kept}}


def _vocab(options: argparse.Namespace) -> int:
    return int(json.loads((Path(options.model) / "config.json").read_text())["vocab_size"])


def open_all(options: argparse.Namespace) -> dict[str, Any]:
    """Open every adapter in the folder: settings, headers, and their match with the base model."""
    from flexbatch.checkpoint.locate import locate
    from flexbatch.lora.folders import adapter_folders
    from flexbatch.lora.reader import AdapterReader, open_adapters
    from flexbatch.models.registry import family_of

    shape = locate(options.model).shape
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    folders = adapter_folders([], options.adapters)
    opened, failed = open_adapters(AdapterReader(family_of(shape).table(shape), shape.family), folders, folders)
    seconds = time.perf_counter() - started
    assert not failed
    return {"adapters": len(opened), "seconds": seconds, "bytes": psutil.Process().memory_info().rss - before}


def main() -> None:
    """Do what is asked, and print or add to a JSON file what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "turns", "first", "one", "open", "memory"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--systems", type=lambda text: text.split(","), default=["flexbatch"])
    parser.add_argument("--count", type=int, default=1000, help="adapters to make")
    parser.add_argument("--counts", default="0,5,1000", help="numbers of adapters that rows choose from")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for each system at each count")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "sim", "cuda"), default="cpu", help="of ours; PEFT has the CPU")
    parser.add_argument("--gpu-memory", help="of --device sim or cuda (default: all)")
    parser.add_argument("--weight-bits", type=int, choices=(16, 4), default=16)
    parser.add_argument("--dummy-weights", action="store_true", help="ours needs a config.json only")
    parser.add_argument("--cpu-memory", default="8GiB", help="what ours may take, so that PEFT has the rest")
    parser.add_argument("--adapter-memory", help="the arena's size (default: as the plan has it)")
    sizes = "PEFT's batch sizes: all are tried on all rows, the best one is measured"
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[256], help=sizes)
    keeps = (
        "whether PEFT's process keeps the memory it frees (its best setting) or gives it back as glibc does by itself"
    )
    parser.add_argument("--peft-memory", choices=("kept", "default"), default="kept", help=keeps)
    parser.add_argument("--trial", type=int, default=4, help="new tokens with which PEFT's batch sizes are tried")
    parser.add_argument("--merges", type=int, default=8, help="adapters that merging is timed on")
    parser.add_argument("--label", help="the name of the figures in the output (default: what was done)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.device != "cpu" and set(options.systems) - {"flexbatch"}:
        parser.error(f"PEFT runs on the CPU: not to be compared with --device {options.device}")
    if options.what == "make":
        make(options)
        return
    counts = [int(text) for text in options.counts.split(",")]
    if options.what == "one":
        print(one(options, counts[0]))
        return
    report: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        report = json.loads(options.output.read_text(encoding="utf-8"))
    report["torch"], report["threads"] = torch.__version__, torch.get_num_threads()
    own = report.setdefault(options.label or options.what, {})

    def note(figures: dict[str, Any]) -> None:
        own.update(figures)
        print(json.dumps(figures, indent=1), flush=True)
        if options.output is not None:
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    if options.what == "open":
        note(open_all(options))
    elif options.what == "first":
        note(first(options, counts))
    elif options.what == "memory":
        note({str(counts[0]): memory(options, counts[0])})
    else:
        with open_llm(options) as llm:
            for count in counts:
                note({str(count): turns(options, llm, count)})


if __name__ == "__main__":
    main()
