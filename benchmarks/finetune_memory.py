"""Memory that finetuning takes, technique by technique: measured bytes of activations, and of the whole process.

    python benchmarks/finetune_memory.py make --model DIR            write a random model of Llama-8B's proportions
    python benchmarks/finetune_memory.py all --model DIR [--output FILE]
    python benchmarks/finetune_memory.py one --model DIR --system NAME

The model has Llama 3 8B's 32 layers, grouped-query attention and proportions at an eighth of its widths. One example of
1,024 tokens, LoRA of rank 16 on all linear layers, fp32 on the CPU. Activations are all bytes that tensors of the
forward and backward pass hold at once (storages that operations return, until they are freed; weights, factors and
their gradients were there before). Each system runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.training import Row, make_llama
from flexbatch.checkpoint.locate import locate
from flexbatch.finetune.meter import ActivationMeter
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trainer import Trainer
from flexbatch.options import EngineOptions
from flexbatch.runtime.hardware import peak_rss
from flexbatch.units import parse_shares

RANK, ALPHA = 16, 32
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "vocab_size": 16032,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
}
PEFT = {
    "peft": "PEFT and autograd",
    "peft-checkpointing": "PEFT with gradient checkpointing",
    "peft-one-layer": "PEFT: what autograd keeps of one layer",
}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "recompute": (
        "ours: pruning and recompute; one window, all logits at once",
        {"window": 1 << 20, "logits": 1 << 40},
    ),
    "loss": ("+ the loss in chunks", {"window": 1 << 20}),
    "window-256": ("+ windows of 256 tokens", {"window": 256}),
    "window-64": ("+ windows of 64 tokens", {"window": 64}),
    "window-16": ("+ windows of 16 tokens", {"window": 16}),
    "disk": ("windows of 64, layer inputs on disk", {"window": 64, "hidden": "0,0,100"}),
    "streamed": ("windows of 64, weights streamed from disk", {"window": 64, "weights": "0,0,100"}),
    "all-disk": (
        "windows of 64, weights and layer inputs on disk",
        {"window": 64, "weights": "0,0,100", "hidden": "0,0,100"},
    ),
    "one-layer": ("ours: what autograd would keep of one layer without recompute", {}),
}


def make(options: argparse.Namespace) -> None:
    """Write the model in fp16."""
    make_llama(SHAPE, options.model)


def example(options: argparse.Namespace) -> Row:
    """Random tokens."""
    vocab = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(3, vocab, (options.tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    return Row.of(tokens)


def run_peft(options: argparse.Namespace) -> dict[str, Any]:
    """One pass of PEFT; its gradients are there before, as ours are."""
    import transformers
    from peft import LoraConfig, get_peft_model

    warnings.simplefilter("ignore")
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model: Any = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    )
    model.train()
    if options.system == "peft-checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    ids = torch.tensor([example(options).tokens])
    if options.system == "peft-one-layer":
        return one_layer(lambda x: peft_layer(base, x), base.config.hidden_size, options)
    seconds = []
    for metered in (True, False):
        started = time.perf_counter()
        with ActivationMeter() if metered else torch.enable_grad() as meter:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            del loss
        if metered:
            assert isinstance(meter, ActivationMeter)
            peak = meter.peak
        seconds.append(time.perf_counter() - started)
    return {"activation_bytes": peak, "process_bytes": peak_rss(), "seconds": seconds[1]}


def peft_layer(base: Any, x: Tensor) -> Tensor:
    """One decoder layer of the base model, adapters included."""
    positions = torch.arange(x.shape[0]).unsqueeze(0)
    rotation = base.model.rotary_emb(x.unsqueeze(0), positions)
    out = base.model.layers[3](x.unsqueeze(0), position_embeddings=rotation, position_ids=positions)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def one_layer(layer: Any, hidden: int, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes that are still held after one layer's forward under autograd, its input included."""
    with ActivationMeter() as meter:
        x = torch.randn(options.tokens, hidden).requires_grad_()
        y = layer(x)
        used = meter.used
        del y
    return {"activation_bytes": used, "process_bytes": 0, "seconds": 0.0}


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Two passes of ours: the first one is measured, the second one timed."""
    folder = locate(str(options.model))
    parameters = Parameters.create(folder.shape, rank=RANK, alpha=ALPHA, target_modules="all-linear", seed=0)
    settings = dict(OURS[options.system][1])
    window, logits = settings.pop("window", None), settings.pop("logits", None)
    shares = {name: parse_shares(settings[name], name) if name in settings else None for name in ("weights", "hidden")}
    engine = EngineOptions(device="cpu", weights=shares["weights"], hidden=shares["hidden"])
    row = example(options)
    with Trainer(folder, parameters, engine, window=window, tokens=options.tokens) as trainer:
        if logits is not None:
            trainer.work.loss_bytes = logits
        if options.system == "one-layer":
            return one_layer(lambda x: trainer.work.whole_layer(4, x), folder.shape.hidden_size, options)
        trainer.accumulate([row], 1 / options.tokens)
        started = time.perf_counter()
        trainer.accumulate([row], 1 / options.tokens)
        seconds = time.perf_counter() - started
        return {
            "activation_bytes": trainer.peak_activation_bytes,
            "process_bytes": peak_rss(),
            "seconds": seconds,
            "planned_working_bytes": trainer.plan.memory["cpu"].working + trainer.plan.memory["cpu"].hidden,
        }


def one(options: argparse.Namespace) -> None:
    """Run one system and print its figures."""
    idle = peak_rss()
    found = run_peft(options) if options.system in PEFT else run_ours(options)
    print(json.dumps({"system": options.system, "idle_process_bytes": idle, **found}))


def everything(options: argparse.Namespace) -> None:
    """Run all systems, print the table, and write the JSON."""
    results = []
    for system in [*PEFT, *OURS]:
        command = [sys.executable, __file__, "one", "--model", str(options.model), "--system", system]
        done = subprocess.run([*command, "--tokens", str(options.tokens)], check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(results[-1], flush=True)
    report = {
        "what": "bytes of activations and of the process in one pass of LoRA finetuning",
        "tokens": options.tokens,
        "shape": SHAPE,
        "rank": RANK,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "results": results,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))


def table(results: list[dict[str, Any]]) -> str:
    """The table by technique, in Markdown."""
    whole = next(each for each in results if each["system"] == "peft")["activation_bytes"]
    lines = [
        "| technique | activations, MB | part of PEFT's | process, MB | s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    titles = {**PEFT, **{name: title for name, (title, _) in OURS.items()}}
    for each in results:
        used = each["activation_bytes"]
        process = f"{each['process_bytes'] / 1e6:.0f}" if each["process_bytes"] else ""
        seconds = f"{each['seconds']:.1f}" if each["seconds"] else ""
        lines.append(f"| {titles[each['system']]} | {used / 1e6:.0f} | {used / whole:.3f} | {process} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("make", "all", "one"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--system", choices=(*PEFT, *OURS))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    {"make": make, "all": everything, "one": one}[options.command](options)


if __name__ == "__main__":
    main()
