"""Inference and finetuning in one process: the rate of each, alone and together, and what it moves.

    python -m benchmarks.coserving --model DIR --setting resident|streamed [--shares 0.1,0.3,0.5] [--output FILE]
    python -m benchmarks.coserving --draw FILE... --picture FILE.svg

``resident``: all weights in RAM, products bound everything. ``streamed``: all weights on disk, whose rate is held to
``--disk-read``, so that products wait; training accumulates four micro-batches a layer and may ride. Inference has more
rows than it can finish; a measurement of both ends after ``--seconds``, of one job alone after ``--alone-seconds``.
Rates are tokens per second over that time; of training, tokens whose backward is complete count, those under way by the
part that is done. One after the other: the straight line between the two rates alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import Row
from flexbatch.checkpoint.locate import ModelFolder, locate
from flexbatch.errors import FlexbatchError
from flexbatch.finetune.coserving import CoServingTrainer
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trainer import Trainer
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Request, TokenizedRequest
from flexbatch.runtime.engine import Engine
from flexbatch.runtime.threads import keep_to_one_core
from flexbatch.sampling import SamplingParams
from flexbatch.units import parse_shares, parse_size

RANK, ALPHA = 16, 32


def requests_of(options: argparse.Namespace, vocab: int) -> list[TokenizedRequest]:
    """More rows than can be finished."""
    rng = random.Random(0)
    params = SamplingParams(max_tokens=options.gen_len, ignore_eos=True)
    return [
        TokenizedRequest(Request(str(row), params, prompt=ids), row, ids)
        for row in range(options.requests)
        if (ids := tuple(rng.randrange(3, vocab) for _ in range(options.prompt_len)))
    ]


def examples_of(options: argparse.Namespace, count: int, vocab: int) -> list[Row]:
    """Rows of one window each."""
    rng = random.Random(1)
    length = options.window + 1
    return [Row.of([rng.randrange(3, vocab) for _ in range(length)]) for _ in range(count)]


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """Where things lie."""
    streamed = options.setting == "streamed"
    return EngineOptions(
        device="cpu",
        weights=parse_shares("0,0,100", "--weights") if streamed else parse_shares("0,100,0", "--weights"),
        rates={"disk_read": parse_size(options.disk_read)} if streamed else {},
        max_sequences=options.sequences,
    )


def parameters_of(folder: ModelFolder) -> Parameters:
    """An untrained adapter."""
    return Parameters.create(folder.shape, rank=RANK, alpha=ALPHA, target_modules="all-linear", seed=0)


def training_alone(options: argparse.Namespace, folder: ModelFolder, batches: int) -> dict[str, Any]:
    """Tokens per second of a ``Trainer``: one accumulation to warm up, then whole ones."""
    rows = examples_of(options, batches, folder.shape.vocab_size)
    parameters, tokens = parameters_of(folder), batches * options.window
    with Trainer(folder, parameters, engine_options(options), window=options.window, tokens=tokens) as trainer:
        trainer.accumulate(rows[: max(1, batches // 8)], 1.0)
        started, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - started < options.alone_seconds:
            trainer.accumulate(rows, 1.0)
            done += tokens
        seconds = time.perf_counter() - started
        return {"training_tok_s": done / seconds, "inference_tok_s": 0.0, "seconds": seconds}


def together(
    options: argparse.Namespace, folder: ModelFolder, batches: int, share: float | None, order: str | None = None
) -> dict[str, Any]:
    """Both at once, or inference alone (``share`` None), for a while."""
    vocab = folder.shape.vocab_size
    shape = folder.shape
    size = model_size(shape, family_of(shape).table(shape))
    tokens = batches * options.window
    requests = requests_of(options, vocab)
    limit = options.alone_seconds if share is None else options.seconds
    trainer = thread = None
    if share is not None:
        trainer = CoServingTrainer(
            parameters_of(folder),
            engine_options(options),
            size,
            window=options.window,
            tokens=tokens,
            longest=options.window,
            share=share,
            order=order,  # type: ignore[arg-type]
            kept=options.kept,
        )
        rows = examples_of(options, batches, vocab)
        thread = threading.Thread(target=_endless, args=(trainer, rows))
    workload = Workload.of(requests)
    with Engine(folder, None, engine_options(options), workload, passenger=trainer) as engine:
        if thread is not None:
            thread.start()
        running = engine.run(requests)
        first = next(running)
        assert first.error is None
        before, started = _counts(engine, trainer, tokens), time.perf_counter()
        for _ in running:
            if time.perf_counter() - started > limit:
                break
        seconds = time.perf_counter() - started
        after = _counts(engine, trainer, tokens)
        if trainer is not None and thread is not None:
            trainer.leave(FlexbatchError("the measurement is over"))
            thread.join()
        found: dict[str, Any] = {
            "share": share,
            "seconds": seconds,
            "inference_tok_s": (after["generated"] - before["generated"]) / seconds,
            "training_tok_s": (after["trained"] - before["trained"]) / seconds,
            "moved_per_sweep": (after["moved"] - before["moved"]) / (after["sweeps"] - before["sweeps"]),
            "sweep_s": seconds / (after["sweeps"] - before["sweeps"]),
            "predicted_sweep_s": engine.plan.predicted["sweep_s"],
            "busy_share": (after["busy"] - before["busy"]) / seconds,
        }
        if trainer is not None:
            found["finetune"] = trainer.stats()
        running.close()  # type: ignore[attr-defined]
    return found


def _endless(trainer: CoServingTrainer, rows: list[Row]) -> None:
    keep_to_one_core()  # as a job's thread does
    try:
        while True:
            trainer.accumulate(rows, 1.0)
    except FlexbatchError:
        return


def _counts(engine: Engine, trainer: CoServingTrainer | None, tokens: int) -> dict[str, float]:
    stats = engine.stats()
    moved = sum(stats["moved_bytes"].values())
    busy = stats["busy_s"].get("cpu", 0.0)
    trained = 0.0
    if trainer is not None:
        trained = trainer.progress * tokens
        moved += sum(trainer.stats()["moved_bytes"].values())
    generated = engine.snapshot().completion_tokens
    return {"generated": generated, "trained": trained, "moved": moved, "sweeps": stats["sweeps"], "busy": busy}


def measure(options: argparse.Namespace) -> None:
    """Each alone, then both at every share."""
    folder = locate(str(options.model))
    batches = options.batches or 4 * folder.shape.num_layers
    results = [{"what": "training alone", **training_alone(options, folder, batches)}]
    print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    results.append({"what": "inference alone", **together(options, folder, batches, None)})
    print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    for share in map(float, options.shares.split(",")):
        results.append({"what": "together", **together(options, folder, batches, share, options.order)})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    report = report_of(options, folder, batches, results)
    print(json.dumps(report, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def report_of(
    options: argparse.Namespace, folder: ModelFolder, batches: int, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """What was measured, with what it is of each alone, and of what the time that products wait allows."""
    train, infer = results[0]["training_tok_s"], results[1]["inference_tok_s"]
    moved, idle = results[1]["moved_per_sweep"], 1 - results[1]["busy_share"]
    for each in results[2:]:
        each["of_inference_alone"] = each["inference_tok_s"] / infer
        each["of_training_alone"] = each["training_tok_s"] / train
        each["one_after_the_other"] = train * max(0.0, 1 - each["inference_tok_s"] / infer)
        each["of_idle_bound"] = each["training_tok_s"] / (train * idle)
        each["moved_more"] = each["moved_per_sweep"] / moved - 1 if moved else 0.0
    return {
        "what": "tokens per second of inference and of finetuning, alone and in one process",
        "setting": options.setting,
        "model": folder.config | {"layers": folder.shape.num_layers},
        "micro_batches": batches,
        "window": options.window,
        "sequences": options.sequences,
        "disk_read": options.disk_read if options.setting == "streamed" else None,
        "threads": torch.get_num_threads(),
        "idle_share_of_inference": idle,
        "results": results,
    }


def draw(options: argparse.Namespace) -> None:
    """One panel a file: inference rate against finetuning rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(options.draw), figsize=(5 * len(options.draw), 4), squeeze=False)
    for panel, path in zip(axes[0], options.draw, strict=True):
        report = json.loads(path.read_text())
        train, infer, *both = report["results"]
        panel.plot(
            [0, infer["inference_tok_s"]], [train["training_tok_s"], 0], "--", color="0.5", label="one after the other"
        )
        points = sorted((each["inference_tok_s"], each["training_tok_s"]) for each in both)
        panel.plot(*zip(*points, strict=True), "o-", label="in one process")
        panel.set_title({"resident": "weights in RAM", "streamed": "weights streamed from disk"}[report["setting"]])
        panel.set_xlabel("inference, tokens/s")
        panel.set_ylabel("finetuning, tokens/s")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.legend()
    figure.tight_layout()
    figure.savefig(options.picture)


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--setting", choices=("resident", "streamed"), default="resident")
    parser.add_argument("--shares", default="0.1,0.3,0.5")
    parser.add_argument("--disk-read", default="250MB")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--alone-seconds", type=float, default=5.0)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--gen-len", type=int, default=16)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--batches", type=int, help="micro-batches of a step (default: 4 for each layer)")
    parser.add_argument("--order", choices=("riding", "reverse"))
    parser.add_argument("--kept", choices=("cpu", "disk"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--draw", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.draw:
        draw(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
