"""The options of ``flexbatch finetune``: their names and help, and the frozen values they become."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

from flexbatch.cli.cofinetune import CoFinetune, agreed
from flexbatch.cli.options import add_device_options, add_dtype_options, device_options, read_template, shares_option
from flexbatch.errors import UsageError
from flexbatch.finetune.options import ALL_LINEAR, SHARE, FinetuneOptions
from flexbatch.options import EngineOptions

_ADAPTERS_OWN = ("rank", "alpha", "target_modules")  # what --init-from brings along


@dataclass(frozen=True, slots=True)
class FinetuneCommand:
    """Everything ``flexbatch finetune`` was asked for. ``template`` is a chat template's text, not its file."""

    model: str
    data: Path
    output: Path
    training: FinetuneOptions
    engine: EngineOptions
    template: str | None = None
    dummy_weights: bool = False
    stats: Path | None = None
    overwrite: bool = False
    quiet: bool = False


def add_finetune_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of ``flexbatch finetune``."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", required=True, help="a folder, a GGUF file, a hub id, a short name such as opt-30b, or demo"
    )
    files.add_argument("--data", required=True, metavar="FILE", type=Path, help="rows to train on, JSONL")
    files.add_argument(
        "-o", "--output", required=True, metavar="DIR", type=Path, help="the adapter's folder, PEFT format"
    )
    files.add_argument("--stats", metavar="FILE", type=Path, help="write losses, speed and memory, JSON")
    files.add_argument("--chat-template", metavar="FILE", type=Path, help="a Jinja template instead of the model's")
    files.add_argument("--overwrite", action="store_true", help="start anew, whatever output or .part is there")
    files.add_argument("--quiet", action="store_true", help="write nothing to stderr but errors")
    add_training_options(parser)
    machine = parser.add_argument_group("machine")
    add_device_options(machine)
    add_dtype_options(machine)
    machine.add_argument(
        "--weights", type=shares_option("--weights"), metavar="SHARES", help="placement: gpu,cpu,disk in percent"
    )


def add_training_options(parser: argparse.ArgumentParser, *, alone: bool = True) -> None:
    """Give ``parser`` the options that say what is trained and how; if not ``alone``, ``--seed`` is there already."""
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--rank", type=int, metavar="N", help="default 16")
    adapter.add_argument("--alpha", type=float, metavar="X", help="products are scaled by alpha / rank (default 32)")
    adapter.add_argument(
        "--target-modules", metavar="NAMES", help="such as q_proj,v_proj (default all-linear: all but the head)"
    )
    adapter.add_argument("--init-from", metavar="DIR", type=Path, help="an adapter to train further")
    adapter.add_argument(
        "--base-bits",
        type=int,
        choices=(16, 4),
        default=16 if alone else None,
        help="of the base's weights (default 16)" if alone else "those of --weight-bits",
    )
    steps = parser.add_argument_group("training")
    steps.add_argument(
        "--learning-rate", type=float, default=2e-4, metavar="X", help="its highest value (default 2e-4)"
    )
    steps.add_argument("--lr-schedule", choices=("cosine", "constant"), default="cosine", help="default cosine")
    steps.add_argument("--warmup-steps", type=int, default=0, metavar="N", help="default 0")
    steps.add_argument("--epochs", type=int, metavar="N", help="times over all rows (default 1)")
    steps.add_argument("--max-steps", type=int, metavar="N", help="without --epochs, as many epochs as that takes")
    steps.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows in memory at a time (default 8)")
    steps.add_argument(
        "--grad-accumulation", type=int, default=1, metavar="N", help="so many batches make one step (default 1)"
    )
    steps.add_argument(
        "--max-length", type=int, metavar="N", help="cut rows to N tokens (default: refuse too long ones)"
    )
    steps.add_argument("--window", type=int, metavar="TOKENS", help="of one step of the backward pass (default auto)")
    steps.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="default adamw")
    steps.add_argument(
        "--optimizer-states", choices=("memory", "disk"), default="memory", help="where they rest (default memory)"
    )
    steps.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="default 0")
    steps.add_argument("--clip", type=float, default=1.0, metavar="X", help="the gradient's norm; 0: off (default 1)")
    steps.add_argument("--dropout", type=float, default=0.0, metavar="P", help="before the adapter (default 0)")
    if alone:
        steps.add_argument(
            "--seed", type=int, default=0, metavar="N", help="of the adapter's start and dropout (default 0)"
        )
    steps.add_argument("--save-every", type=int, default=50, metavar="N", help="steps from checkpoint to checkpoint")


def add_cofinetune_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser``, which has the options of ``flexbatch run``, those of finetuning beside it."""
    group = parser.add_argument_group("finetuning beside generation (with the options of flexbatch finetune)")
    group.add_argument("--finetune", metavar="FILE", type=Path, help="train a LoRA adapter on these rows meanwhile")
    group.add_argument("--adapter-output", metavar="DIR", type=Path, help="the adapter's folder, PEFT format")
    group.add_argument(
        "--finetune-share", type=float, metavar="X", help=f"of its time that generation may lose (default {SHARE})"
    )
    add_training_options(parser, alone=False)


def cofinetune_options(values: argparse.Namespace, engine: EngineOptions, *, writes: bool = True) -> CoFinetune | None:
    """Return what ``add_cofinetune_options`` parsed; UsageError where something is missing, or has no meaning.

    ``writes``: whether an adapter comes of it, so that it needs a place.
    """
    if values.finetune is None:
        _refuse_without_finetune(values)
        return None
    training = training_options(values)
    if values.adapter_output is None and writes:
        raise UsageError("--finetune: give the adapter's folder, too: --adapter-output DIR")
    share = SHARE if values.finetune_share is None else values.finetune_share
    if not 0 < share < 1:
        raise UsageError(f"--finetune-share {share:g}: give a part of generation's time between 0 and 1, such as 0.1")
    output = values.adapter_output or Path()
    return CoFinetune(values.finetune, output, agreed(training, engine, values.base_bits), share)


def _refuse_without_finetune(values: argparse.Namespace) -> None:
    training = training_options(argparse.Namespace(**{**vars(values), "seed": 0}))
    given = [name for name in ("adapter_output", "finetune_share", "base_bits") if getattr(values, name) is not None]
    plain = FinetuneOptions()
    given += [field.name for field in fields(plain) if getattr(training, field.name) != getattr(plain, field.name)]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')}: goes with --finetune FILE, which is not there")


def finetune_command(values: argparse.Namespace) -> FinetuneCommand:
    """Return the options that ``add_finetune_options`` parsed; UsageError names the one that is wrong."""
    machine = device_options(values)
    training = training_options(values)
    return FinetuneCommand(
        model=values.model,
        data=values.data,
        output=values.output,
        training=training,
        engine=replace(
            machine,
            cpu_memory=values.cpu_memory,
            disk_memory=values.disk_memory,
            weights=values.weights,
            dtype=values.dtype,
            weight_bits=training.base_bits,
        ),
        template=read_template(values.chat_template),
        dummy_weights=values.dummy_weights,
        stats=values.stats,
        overwrite=values.overwrite,
        quiet=values.quiet,
    )


def training_options(values: argparse.Namespace) -> FinetuneOptions:
    """Return the options that ``add_training_options`` parsed."""
    if values.init_from is not None:
        for name in _ADAPTERS_OWN:
            if getattr(values, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option}: the adapter of --init-from {values.init_from} has its own: leave it out")
    targets = values.target_modules
    return FinetuneOptions(
        rank=16 if values.rank is None else values.rank,
        alpha=32.0 if values.alpha is None else values.alpha,
        target_modules=ALL_LINEAR if targets in (None, ALL_LINEAR) else tuple(targets.split(",")),
        learning_rate=values.learning_rate,
        epochs=values.epochs,
        max_steps=values.max_steps,
        batch_size=values.batch_size,
        grad_accumulation=values.grad_accumulation,
        max_length=values.max_length,
        window=values.window,
        optimizer=values.optimizer,
        lr_schedule=values.lr_schedule,
        weight_decay=values.weight_decay,
        warmup_steps=values.warmup_steps,
        clip=values.clip,
        dropout=values.dropout,
        seed=values.seed,
        base_bits=values.base_bits or 16,
        init_from=values.init_from,
        save_every=values.save_every,
        optimizer_states=values.optimizer_states,
    )
