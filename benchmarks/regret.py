"""How much is lost by letting the policy choose: its plan against a grid of plans set by hand, all measured.

    python benchmarks/regret.py --models DIR,DIR [--disk-dir DIR] [--rows 64] [--only NAME] [--output FILE]

For every setting (model, device, memory) the policy's plan and at least 20 hand-set ones run the same rows in turns, in
one process each; the policy's runs first, in the middle and last, and its median counts. The ratio is its throughput
over that of the best other one, loading not counted; 0.9 is the aim.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch import LLM, SamplingParams
from flexbatch.errors import DoesNotFitError
from flexbatch.options import Resource


@dataclass(frozen=True, slots=True)
class Case:
    """A machine for one model: ``fixed`` options hold for the policy, too; ``memory`` is a part of the checkpoint."""

    name: str
    device: str
    cpu_memory: float
    gpu_memory: float | None
    rates: dict[Resource, float]


CASES = [
    Case("cpu, a third of the weights fit", "cpu", 0.7, None, {}),
    Case("cpu, slow disk, most fit", "cpu", 2.2, None, {"disk_read": 4e8}),
    Case("sim, GPU and RAM hold parts", "sim", 0.8, 0.7, {"h2d": 1.5e9, "d2h": 1.5e9, "disk_read": 6e8}),
]


def grid(device: str) -> Iterator[dict[str, Any]]:
    """Hand-set plans, from the sensible to the bold."""
    if device == "cpu":
        weights = ["0,0,100", "0,20,80", "0,40,60", "0,70,30", "0,100,0"]
        for share, sequences, batch in itertools.product(weights, (8, 24, 64), (32, 256)):
            yield {"weights": share, "kv": "0,100,0", "max_sequences": sequences, "micro_batch": batch}
    else:
        weights = ["0,0,100", "20,40,40", "50,25,25", "40,60,0", "0,60,40", "70,0,30"]
        for share, kv, sequences in itertools.product(weights, ("100,0,0", "0,100,0"), (16, 64)):
            for attention in (True,) if kv == "100,0,0" else (True, False):
                yield {"weights": share, "kv": kv, "max_sequences": sequences, "cpu_attention": attention}


def throughput(model: str, case: Case, plan: dict[str, Any], options: argparse.Namespace) -> float | None:
    """Tokens a second of all rows; None if the plan does not fit."""
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    prompts = [
        [(row * 37 + place * 11) % 1000 + 5 for place in range(options.prompt_len)] for row in range(options.rows)
    ]
    gpu = None if case.gpu_memory is None else int(case.gpu_memory * size)
    try:
        with LLM(
            model,
            device=case.device,
            cpu_memory=int(case.cpu_memory * size),
            gpu_memory=gpu,
            rates=case.rates,
            disk_dir=options.disk_dir,
            **plan,
        ) as llm:
            llm.generate(prompts, SamplingParams(max_tokens=options.gen_len, ignore_eos=True))
            rate: float = llm.stats()["throughput_tok_s"]
            return rate
    except DoesNotFitError:
        return None


def measured(model: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One case: all of the grid that fits, and the policy."""
    tried: list[dict[str, Any]] = []
    chosen: list[float] = []

    def choose() -> None:
        rate = throughput(model, case, {}, options)
        assert rate is not None
        chosen.append(rate)

    plans = list(grid(case.device))
    choose()
    for number, plan in enumerate(plans):
        rate = throughput(model, case, plan, options)
        if rate is not None:
            tried.append({**plan, "tok_s": rate})
            print(json.dumps(tried[-1]), flush=True)
        if number == len(plans) // 2:
            choose()
    choose()
    best = max(tried, key=lambda plan: plan["tok_s"])
    return {
        "case": case.name,
        "model": Path(model).name,
        "policy_tok_s": chosen,
        "best": best,
        "ratio": statistics.median(chosen) / best["tok_s"],
        "fitting": len(tried),
        "tried": tried,
    }


def main() -> None:
    """Run all cases and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True)
    parser.add_argument("--disk-dir", default=tempfile.gettempdir())
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--gen-len", type=int, default=8)
    parser.add_argument("--only", default="", help="a part of the cases' names")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    models = options.models.split(",")
    reports = []
    for number, case in enumerate(CASES):
        if options.only not in case.name:
            continue
        reports.append(measured(models[number % len(models)], case, options))
        print(json.dumps({name: reports[-1][name] for name in ("case", "policy_tok_s", "best", "ratio", "fitting")}))
        if options.output:
            options.output.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
