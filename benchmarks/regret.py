"""How much is lost by letting the policy choose: its plan against a grid of plans set by hand, all measured.

    python benchmarks/regret.py --models DIR,DIR [--disk-dir DIR] [--rows 32] [--only NAME] [--output FILE]

For every setting (model, device, memory) at least 20 hand-set plans run the same rows, and the policy's among them.
Then the best three and the policy's run in turns, and medians are compared, for the best of many single runs is best by
chance, too. The ratio is the policy's throughput over that of the best other one, loading not counted; 0.9 is the aim.
``--grid`` takes what an earlier output has measured of the grid.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
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
    weights: tuple[str, ...]  # shares of the hand-set plans


CASES = [
    Case(
        "cpu, a third of the weights fit",
        "cpu",
        0.7,
        None,
        {},
        ("0,0,100", "0,5,95", "0,10,90", "0,15,85", "0,20,80", "0,25,75", "0,30,70"),
    ),
    Case(
        "cpu, slow disk, most fit",
        "cpu",
        2.2,
        None,
        {"disk_read": 8e8},
        ("0,0,100", "0,20,80", "0,40,60", "0,55,45", "0,70,30", "0,85,15", "0,100,0"),
    ),
    Case(
        "sim, GPU and RAM hold parts",
        "sim",
        0.8,
        0.7,
        {"h2d": 1.5e9, "d2h": 1.5e9, "disk_read": 8e8},
        ("0,0,100", "20,40,40", "40,25,35", "30,70,0", "0,60,40", "40,0,60"),
    ),
]


FINALISTS = 3


def grid(case: Case, in_flight: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Hand-set plans, from the sensible to the bold."""
    if case.device == "cpu":
        for share, sequences, batch in itertools.product(case.weights, in_flight, (64, 256)):
            yield {"weights": share, "kv": "0,100,0", "max_sequences": sequences, "micro_batch": batch}
    else:
        for share, kv, sequences in itertools.product(case.weights, ("100,0,0", "0,100,0"), in_flight):
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
    """One case: all of the grid that fits, the policy among it; then the best few and the policy in turns."""
    tried: list[dict[str, Any]] = [] if options.grid is None else _earlier(options.grid, case)
    chosen: list[float] = []

    def choose() -> None:
        rate = throughput(model, case, {}, options)
        assert rate is not None
        chosen.append(rate)

    plans = [plan for plan in grid(case, options.sequences) if not any(plan.items() <= one.items() for one in tried)]
    for number, plan in enumerate(plans):
        if number % (len(plans) // 2 + 1) == 0:
            choose()
        rate = throughput(model, case, plan, options)
        if rate is not None:
            tried.append({**plan, "tok_s": rate})
            print(json.dumps(tried[-1]), flush=True)
    finalists = sorted(tried, key=lambda plan: -plan["tok_s"])[:FINALISTS]
    again: list[list[float]] = [[] for _ in finalists]
    for _ in range(options.rounds):
        choose()
        for plan, rates in zip(finalists, again, strict=True):
            given = {name: value for name, value in plan.items() if name != "tok_s"}
            rates.append(throughput(model, case, given, options) or 0.0)
    best = max(statistics.median(rates) for rates in again)
    last = chosen[-options.rounds :]
    return {
        "case": case.name,
        "model": Path(model).name,
        "policy_tok_s": chosen,
        "finalists": [{**plan, "again": rates} for plan, rates in zip(finalists, again, strict=True)],
        "ratio": statistics.median(last) / best,
        "fitting": len(tried),
        "tried": tried,
    }


def _earlier(path: Path, case: Case) -> list[dict[str, Any]]:
    """The measured grid of ``case`` in a former output."""
    found = [report["tried"] for report in json.loads(path.read_bytes()) if report["case"] == case.name]
    return found[0] if found else []


def main() -> None:
    """Run all cases and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True)
    parser.add_argument("--disk-dir", default=tempfile.gettempdir())
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--gen-len", type=int, default=8)
    parser.add_argument(
        "--sequences", type=lambda text: [int(one) for one in text.split(",")], default=[8, 16, 32], help="in flight"
    )
    parser.add_argument("--only", default="", help="a part of the cases' names")
    parser.add_argument("--rounds", type=int, default=3, help="of the best three and the policy's plan")
    parser.add_argument("--grid", type=Path, help="an earlier output")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    models = options.models.split(",")
    reports = []
    for number, case in enumerate(CASES):
        if options.only not in case.name:
            continue
        reports.append(measured(models[number % len(models)], case, options))
        print(
            json.dumps({name: reports[-1][name] for name in ("case", "policy_tok_s", "finalists", "ratio", "fitting")})
        )
        if options.output:
            options.output.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
