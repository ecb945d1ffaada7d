"""Whole-file generation on a CPU against ``transformers.generate``: ragged rows and uniform rows, in turns.

    python benchmarks/generate_vs_transformers.py --model DIR [--runs 3] [--output benchmarks/results/NAME.json]

Both sides compute in fp32 with the same threads, prompts and numbers of new tokens (end-of-sequence ignored, so that
both do the same work). transformers runs padded batches of rows sorted by length, at the best of several batch sizes,
each batch as long as its longest row needs. Medians of interleaved runs; ratios are what to read.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexbatch import LLM, SamplingParams

_TEXT = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8")


def rows(kind: str, tokenizer: Any, count: int) -> list[tuple[list[int], int]]:
    """Prompts cut from real prose, with the number of tokens each is to generate."""
    ids: list[int] = tokenizer(_TEXT)["input_ids"]
    rng = random.Random(0)
    made = []
    for _ in range(count):
        length, new = (rng.randint(20, 400), rng.randint(8, 128)) if kind == "ragged" else (128, 64)
        start = rng.randrange(len(ids) - length)
        made.append((ids[start : start + length], new))
    return made


def run_transformers(model: Any, work: list[tuple[list[int], int]], batch: int) -> float:
    """Seconds for all rows in padded batches; sorted so that padding and waiting are least."""
    order = sorted(work, key=lambda row: (row[1], len(row[0])))
    started = time.perf_counter()
    with torch.inference_mode():
        for begin in range(0, len(order), batch):
            part = order[begin : begin + batch]
            longest = max(len(prompt) for prompt, _ in part)
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in part])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in part])
            new = max(new for _, new in part)
            model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
    return time.perf_counter() - started


def run_flexbatch(llm: LLM, work: list[tuple[list[int], int]]) -> float:
    """Seconds for all rows."""
    params = [SamplingParams(max_tokens=new, ignore_eos=True) for _, new in work]
    started = time.perf_counter()
    results = llm.generate([prompt for prompt, _ in work], params)
    assert [result.completion_tokens for result in results] == [new for _, new in work]
    return time.perf_counter() - started


def compare(kind: str, llm: LLM, model: Any, tokenizer: Any, count: int, runs: int, sizes: list[int]) -> dict[str, Any]:
    """Interleaved runs of both on the same rows."""
    work = rows(kind, tokenizer, count)
    trial = {size: run_transformers(model, work, size) for size in sizes} if len(sizes) > 1 else {}
    best = min(trial, key=lambda size: trial[size]) if trial else sizes[0]
    run_flexbatch(llm, work[:8])
    ours, theirs = [], []
    for _ in range(runs):
        before = llm.stats()
        ours.append(run_flexbatch(llm, work))
        after = llm.stats()
        theirs.append(run_transformers(model, work, best))
    flops = sum(after["flops"][name] - before["flops"][name] for name in ("linear", "attention"))
    seconds = statistics.median(ours)
    busy = {name: after["step_s"][name] - before["step_s"][name] for name in after["step_s"]}
    tokens = sum(new for _, new in work)
    return {
        "rows": count,
        "prompt_tokens": sum(len(prompt) for prompt, _ in work),
        "new_tokens": tokens,
        "flexbatch_s": seconds,
        "flexbatch_tok_s": tokens / seconds,
        "transformers_s": statistics.median(theirs),
        "transformers_best_batch": best,
        "transformers_by_batch_s": trial,
        "ratio": statistics.median(t / o for o, t in zip(ours, theirs, strict=True)),
        "bound_s": flops / after["flops"]["rate"],
        "achieved_over_bound": flops / after["flops"]["rate"] / seconds,
        "flop_rate": after["flops"]["rate"],
        "last_run_step_s": busy,
    }


def main() -> None:
    """Run both comparisons and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", default="ragged,uniform")
    parser.add_argument("--sizes", default="8,16,32,64", help="batch sizes that transformers is tried at")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    report: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
    }
    with LLM(options.model, device="cpu") as llm:
        for kind in options.kinds.split(","):
            report[kind] = compare(kind, llm, model, tokenizer, options.rows, options.runs, sizes)
            print(json.dumps({kind: report[kind]}, indent=1), flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
