"""Tokens per second of LoRA finetuning with resident weights: ours and PEFT with gradient checkpointing.

    python benchmarks/finetune_speed.py --model DIR [--rows 8] [--tokens 256] [--rounds 3] [--output FILE]

One accumulation (forward and backward of all rows, no optimizer step) of rank 16 on all linear layers, fp32 on the CPU,
every token but the first a target. Systems take turns; the best size of each is the one with the highest median.
``--ragged`` draws lengths from 1/4 of ``--tokens`` to all of them; PEFT's batches are then sorted by length and padded.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import Row
from flexbatch.checkpoint.locate import locate
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trainer import Trainer
from flexbatch.options import EngineOptions
from flexbatch.policy.machines import load_profile

RANK, ALPHA = 16, 32


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Random tokens."""
    rng = random.Random(0)
    vocab = json.loads((options.model / "config.json").read_text())["vocab_size"]
    rows = []
    for _ in range(options.rows):
        length = rng.randint(options.tokens // 4, options.tokens) if options.ragged else options.tokens
        rows.append(Row.of([rng.randrange(3, vocab) for _ in range(length)]))
    return rows


def peft_model(options: argparse.Namespace) -> Any:
    """PEFT's model with gradient checkpointing."""
    import transformers
    from peft import LoraConfig, get_peft_model

    warnings.simplefilter("ignore")
    base = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model: Any = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    )
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def peft_pass(model: Any, rows: list[Row], size: int) -> None:
    """Forward and backward of all rows in batches of ``size``, padded."""
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        longest = max(len(row.tokens) for row in part)
        ids = torch.tensor([[*row.tokens, *[0] * (longest - len(row.tokens))] for row in part])
        mask = torch.tensor([[1] * len(row.tokens) + [0] * (longest - len(row.tokens)) for row in part])
        labels = ids.masked_fill(mask == 0, -100)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()


def distance(model: Any, trainer: Trainer, rows: list[Row], size: int) -> float:
    """The largest norm of the difference over the norm, of the gradients of B.

    Both adapters are untrained, so the gradients of A are zeros; both systems are given the same A first.
    """
    parameters = trainer.parameters
    named = {name.replace(".default.", "."): each for name, each in model.named_parameters() if each.requires_grad}
    assert set(named) == set(parameters.names())
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(parameters.parameter(name))
    parameters.zero()
    total = sum(len(row.tokens) - 1 for row in rows)
    trainer.accumulate(rows, 1 / total)
    assert size >= len(rows), "all rows in one batch, so that means are over the same tokens"
    model.zero_grad()
    peft_pass(model, rows, size)
    found = []
    for name, tensor in named.items():
        if ".lora_B." in name:
            expected = tensor.grad.double()
            found.append(float((parameters.gradient(name).double() - expected).norm() / expected.norm()))
    return max(found)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="1,2,4")
    parser.add_argument("--windows", default="256,512")
    parser.add_argument("--profile", type=Path, help="predict ours with these figures, too")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = rows_of(options)
    folder = locate(str(options.model))
    parameters = Parameters.create(folder.shape, rank=RANK, alpha=ALPHA, target_modules="all-linear", seed=0)
    total = sum(len(row.tokens) for row in rows)
    model = peft_model(options)
    systems: dict[str, Callable[[], object]] = {}
    trainers = []
    for window in map(int, options.windows.split(",")):
        trainer = Trainer(folder, parameters, EngineOptions(device="cpu"), window=window, tokens=total)
        trainers.append(trainer)
        systems[f"ours, windows of {window}"] = lambda trainer=trainer: trainer.accumulate(rows, 1 / total)  # type: ignore[misc]
    for size in map(int, options.sizes.split(",")):
        systems[f"PEFT, batches of {size}"] = lambda size=size: peft_pass(model, rows, size)  # type: ignore[misc]
    predicted = (
        total / trainers[0].predict(rows, load_profile(str(options.profile))).seconds if options.profile else None
    )
    compared = distance(model, trainers[0], rows[:2], 2)
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds + 1):
        for name, run in systems.items():
            started = time.perf_counter()
            run()
            print(f"{name}: {total / (time.perf_counter() - started):.1f} tokens/s", file=sys.stderr, flush=True)
            if number:  # the first one warms up, and ours measures its memory
                seconds[name].append(time.perf_counter() - started)
    for trainer in trainers:
        trainer.close()
    rates = {name: total / statistics.median(own) for name, own in seconds.items()}
    best = {who: max(rate for name, rate in rates.items() if name.startswith(who)) for who in ("ours", "PEFT")}
    report = {
        "what": "tokens per second of one accumulation of LoRA finetuning, fp32 on the CPU",
        "model": folder.name,
        "rows": options.rows,
        "tokens": total,
        "ragged": options.ragged,
        "threads": torch.get_num_threads(),
        "tokens_per_s": rates,
        "predicted_tokens_per_s": predicted,
        "seconds": dict(seconds),
        "gradients_differ_by": compared,
        "peak_activation_bytes": trainers[0].peak_activation_bytes,
        "ratio": best["ours"] / best["PEFT"],
    }
    print(json.dumps(report, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
