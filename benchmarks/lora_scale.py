"""Throughput over the number of LoRA adapters: ours, PEFT's mixed batches, and merging one adapter after the other.

    python benchmarks/lora_scale.py make --model DIR --adapters DIR [--count 1000]     write random adapters
    python benchmarks/lora_scale.py run --model DIR --adapters DIR --system flexbatch|peft|merge --counts 5,100
    python benchmarks/lora_scale.py together --model DIR --adapters DIR --counts 0,5,1000   ours, in turn in one process
    python benchmarks/lora_scale.py open --model DIR --adapters DIR                     time to open all of them
    python benchmarks/lora_scale.py sum --output FILE                                   ratios of what FILE holds

As in S-LoRA's table: ranks 8, 16, 32 and 64 on q, k, v and o, a random adapter for each of 256 rows of 64 prompt and 32
new tokens, on the CPU in ``--dtype`` (fp32 unless given; PEFT's adapters too). ``run`` adds its figures to
``--output``, so that long measurements can be made in pieces; count 0 is the base model alone. ``extra_s`` of ours is
what the products of the adapters and one pass over the factors for every decoding row cost at rates measured in the
same process; ``products_s`` what all products of base model and adapters cost alone: no run in that type takes less.
Ours and PEFT's are measured in memory that is not new: ours as the second job of a process, whose first one had other
adapters (``first_tok_s``), PEFT's after one batch. ``cpu_s`` are seconds of all processors, which say more than
``seconds`` where others compute on the same machine. ``sum`` adds the ratios. PEFT's batch sizes are each tried on at
least one whole batch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

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


def work(options: argparse.Namespace, count: int, vocab: int) -> tuple[list[list[int]], list[str | None]]:
    """Prompts of random tokens, and the adapter of each."""
    rng = random.Random(count)
    prompts = [[rng.randrange(1000, vocab) for _ in range(options.prompt)] for _ in range(options.rows)]
    return prompts, [f"a{rng.randrange(count)}" if count else None for _ in range(options.rows)]


def others(options: argparse.Namespace, names: list[str | None]) -> list[str | None]:
    """As many adapters for as many rows, or somewhat more, none of them among ``names``."""
    used = set(names)
    if used == {None}:
        return names
    free = [name for number in range(10_000) if (name := f"a{number}") not in used]
    there = [name for name in free if (options.adapters / name).is_dir()]
    count = min(len(names), len(used) + len(used) // 8 + 1, len(there))
    return [there[row % count] for row in range(len(names))]


def run_flexbatch(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """The throughput of a job that follows another with other adapters: what it needs is read, memory is not new.

    New memory costs what the machine takes to provide it (a virtual one 1 to 3 seconds a GB), once: ``first_tok_s``.
    """
    vocab = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    prompts, names = work(options, count, vocab)
    settings: dict[str, Any] = {"device": "cpu", "adapter_memory": options.adapter_memory, "dtype": options.dtype}
    params = SamplingParams(max_tokens=options.new, ignore_eos=True)
    with LLM(options.model, lora_dir=options.adapters if count else None, **settings) as llm:
        started = _now()
        llm.generate(prompts, params, lora=others(options, names))
        first = _since(started)["seconds"]
        before, started = llm.stats(), _now()
        results = llm.generate(prompts, params, lora=names)
        times = _since(started)
        stats = llm.stats()
    assert all(result.completion_tokens == options.new for result in results)
    extra, products = adapter_seconds(options, names)
    products += stats["roofline_s"] - before["roofline_s"]
    steps = {name: stats["step_s"][name] - before["step_s"].get(name, 0.0) for name in stats["step_s"]}
    return {
        **times,
        "rows": options.rows,
        "tok_s": options.rows * options.new / times["seconds"],
        "first_tok_s": options.rows * options.new / first,
        "distinct": len(set(names) - {None}),
        "step_s": steps,
        "adapters": {name: value for name, value in stats["adapters"].items() if name != "rows"},
        "adapters_before": {name: before["adapters"].get(name) for name in ("reads", "bytes_read")},
        "peak_bytes": stats["peak_bytes"]["cpu"],
        "extra_s": extra,
        "products_s": products,
    }


def run_together(options: argparse.Namespace, counts: Sequence[int]) -> dict[str, Any]:
    """Jobs of all ``counts`` in turn in one process, ``--rounds`` times: ratios that hold on a machine that drifts.

    Two sets of adapters of each count take turns, so that each job reads its own, into memory that is not new.
    """
    vocab = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    settings: dict[str, Any] = {"device": "cpu", "adapter_memory": options.adapter_memory, "dtype": options.dtype}
    params = SamplingParams(max_tokens=options.new, ignore_eos=True)
    jobs = {count: work(options, count, vocab) for count in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    extra: dict[int, float] = {}
    with LLM(options.model, lora_dir=options.adapters, **settings) as llm:
        for number in range(options.rounds + 1):
            for count, (prompts, names) in jobs.items():
                started = time.perf_counter()
                llm.generate(prompts, params, lora=names if number % 2 else others(options, names))
                if number:  # before, memory is new
                    seconds[count].append(time.perf_counter() - started)
    for count, (_, names) in jobs.items():
        extra[count] = adapter_seconds(options, names)[0]
    middle = {count: statistics.median(each) for count, each in seconds.items()}
    base = middle.get(0)
    return {
        "seconds": seconds,
        "tok_s": {count: options.rows * options.new / each for count, each in middle.items()},
        "extra_s": extra,
        "to_their_cost": {count: (base + extra[count]) / middle[count] for count in counts} if base else None,
    }


def adapter_seconds(options: argparse.Namespace, names: list[str | None]) -> tuple[float, float]:
    """What adapters cost at measured rates, in seconds; and their products alone.

    Prompts' products and, for each new token, a pass over the factors in fp32. The first one comes with the prompt.
    """
    if not any(names):
        return 0.0, 0.0
    numbers = torch.ones(2**26)  # written: pages that never were are all one, and come from a cache
    read = statistics.median(_timed(numbers.sum) for _ in range(3)) / numbers.nbytes
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    flop = statistics.median(_timed(lambda: a @ b) for _ in range(5)) / (2 * 1024**3)
    files = [options.adapters / str(name) / "adapter_model.safetensors" for name in names]
    elements = sum(file.stat().st_size / 2 for file in files)
    later = options.new - 1
    return (
        elements * (4 * read * later + 2 * flop * options.prompt),
        elements * 2 * flop * (options.prompt + later),
    )


def _timed(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> dict[str, float]:
    return {"seconds": time.perf_counter() - started[0], "cpu_s": time.process_time() - started[1]}


def run_peft(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """PEFT's mixed-batch generation (``adapter_names``), at the batch size that is best on a part of the rows."""
    model, names, prompts = _peft(options, count)

    def generate(rows: range, batch: int) -> dict[str, float]:
        started = _now()
        for begin in range(rows.start, rows.stop, batch):
            part = slice(begin, min(begin + batch, rows.stop))
            ids = torch.tensor(prompts[part])
            mixed = {"adapter_names": names[part]} if count else {}
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **mixed, **_fixed(options))
        return _since(started)

    generate(range(min(options.sizes[0], options.rows)), options.sizes[0])  # as ours: memory is not new
    sizes = sorted({min(size, options.rows) for size in options.sizes})
    by_size: dict[int, float] = {}
    for size in sizes if len(sizes) > 1 else []:
        tried = min(max(size, options.trial // size * size), options.rows)
        by_size[size] = generate(range(tried), size)["seconds"] / tried
    best = min(by_size, key=lambda size: by_size[size]) if by_size else sizes[0]
    rows = range(min(options.peft_rows, options.rows))
    times = generate(rows, best)
    tok_s = len(rows) * options.new / times["seconds"]
    return {**times, "rows": len(rows), "tok_s": tok_s, "batch": best, "trial_s_a_row": by_size}


def run_merge(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """One adapter after the other, merged into the weights and taken out again; its rows in one batch."""
    model, names, prompts = _peft(options, count)
    used = sorted(set(names))[: options.merges]
    done = 0
    started = _now()
    for name in used:
        model.set_adapter(name)
        model.merge_adapter()
        own = [prompt for prompt, other in zip(prompts, names, strict=True) if other == name]
        ids = torch.tensor(own)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **_fixed(options))
        model.unmerge_adapter()
        done += len(own)
    times = _since(started)
    return {**times, "rows": done, "tok_s": done * options.new / times["seconds"]}


def _peft(options: argparse.Namespace, count: int) -> tuple[Any, list[str], list[list[int]]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    prompts, named = work(options, count, base.config.vocab_size)
    names = [name or "__base__" for name in named]
    limit = max(options.peft_rows, options.trial, *options.sizes) if options.system == "peft" else options.rows
    used = sorted(set(names[:limit]) - {"__base__"})
    if options.system == "merge":
        used = used[: options.merges]
    model: Any = base
    for name in used:
        folder = options.adapters / name
        if model is base:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters() if model is not base else ():
        if "lora_" in name:  # files are in fp16
            parameter.data = parameter.data.to(base.dtype)
    return model.eval(), names, prompts


def _fixed(options: argparse.Namespace) -> dict[str, Any]:
    return {"max_new_tokens": options.new, "min_new_tokens": options.new, "do_sample": False, "pad_token_id": 0}


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


def keep_best(runs: dict[str, Any], count: str, figures: dict[str, Any]) -> None:
    """Note a run; of PEFT's, the one with the best batch size so far, and what the others gave."""
    if "batch" in figures:
        known = runs.get(count)
        tried = {**(known or {}).get("tok_s_by_batch", {}), str(figures["batch"]): figures["tok_s"]}
        best = known if known is not None and known["tok_s"] > figures["tok_s"] else figures
        figures = {**best, "tok_s_by_batch": tried}
    runs[count] = figures


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Ratios of throughputs, by the clock and by processor seconds a row."""
    ours = {int(count): run for count, run in report.get("flexbatch", {}).items()}
    ratios: dict[str, Any] = {}

    def compare(name: str, one: dict[str, Any] | None, other: dict[str, Any] | None) -> None:
        if one is not None and other is not None:
            by_cpu = other["cpu_s"] / other["rows"] * one["rows"] / one["cpu_s"]
            ratios[name] = {"by_clock": one["tok_s"] / other["tok_s"], "by_cpu": by_cpu}

    compare("5 adapters to base alone", ours.get(5), ours.get(0))
    compare("1000 adapters to 5", ours.get(1000), ours.get(5))
    compare(
        "1000 adapters in a small arena to 1000", report.get("flexbatch_small_arena", {}).get("1000"), ours.get(1000)
    )
    for count in ("0", "100"):
        compare(f"ours to PEFT's at {count}", ours.get(int(count)), report.get("peft", {}).get(count))
    compare("ours to merging at 100", ours.get(100), report.get("merge", {}).get("100"))
    if 100 in ours and "100" in report.get("peft", {}):
        mixed, peft = ours[100], report["peft"]["100"]
        least = mixed["products_s"] / mixed["rows"]
        ratios["most that products allow of PEFT's at 100"] = {"by_clock": peft["seconds"] / peft["rows"] / least}
    if 0 in ours and 1000 in ours:
        base, many = ours[0], ours[1000]
        extra = many["extra_s"]
        ratios["1000 adapters to their cost at measured rates"] = {
            "by_clock": (base["seconds"] / base["rows"] + extra / many["rows"]) * many["rows"] / many["seconds"],
            "by_cpu": (base["cpu_s"] / base["rows"] + extra * report["threads"] / many["rows"])
            * many["rows"]
            / many["cpu_s"],
        }
    return ratios


def main() -> None:
    """Do one of the four, and print or add to a JSON file what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "together", "open", "sum"))
    parser.add_argument("--model")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--system", choices=("flexbatch", "peft", "merge"), default="flexbatch")
    parser.add_argument("--count", type=int, default=1000, help="adapters to make")
    parser.add_argument("--counts", default="0,5,1000", help="numbers of adapters that rows choose from")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4, help="of jobs that take turns in one process")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--adapter-memory", help="the arena's size (default: as the plan has it)")
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[32, 64, 128])
    parser.add_argument("--trial", type=int, default=32, help="rows on which PEFT's batch sizes are tried")
    parser.add_argument("--peft-rows", type=int, default=256, help="rows that PEFT is timed on")
    parser.add_argument("--merges", type=int, default=16, help="adapters that merging is timed on")
    parser.add_argument("--label", help="the name of the figures in the output (default: the system)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what != "sum" and not (options.model and options.adapters):
        parser.error("--model and --adapters are needed")
    if options.what == "make":
        make(options)
        return
    report: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        report = json.loads(options.output.read_text(encoding="utf-8"))
    report["torch"], report["threads"] = torch.__version__, torch.get_num_threads()
    if options.what == "sum":
        report["ratios"] = summary(report)
        print(json.dumps(report["ratios"], indent=1))
    elif options.what == "together":
        report["together"] = run_together(options, [int(text) for text in options.counts.split(",")])
        print(json.dumps(report["together"], indent=1))
    elif options.what == "open":
        report["open"] = open_all(options)
        print(json.dumps(report["open"], indent=1))
    else:
        runs = {"flexbatch": run_flexbatch, "peft": run_peft, "merge": run_merge}
        for count in [int(text) for text in options.counts.split(",")]:
            figures = runs[options.system](options, count)
            keep_best(report.setdefault(options.label or options.system, {}), str(count), figures)
            print(json.dumps({options.system: {count: figures}}, indent=1), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
