"""The options of ``flexbatch run``: their names and help, and the frozen values they become.

Checks each value where it can be checked without the model; knows nothing of what is done with it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flexbatch.checkpoint.hub import canonical
from flexbatch.cli.cofinetune import CoFinetune
from flexbatch.errors import UsageError
from flexbatch.options import THROTTLED, EngineOptions, Resource
from flexbatch.policy.saved import load_plan
from flexbatch.sampling import SamplingParams
from flexbatch.units import Shares, parse_shares, parse_size

_DEVICE = re.compile(r"auto|cpu|sim|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Everything ``flexbatch run`` was asked for. ``template`` is a chat template's text, not its file."""

    model: str
    input: str
    output: Path
    params: SamplingParams
    engine: EngineOptions
    chat: bool = False
    template: str | None = None
    dummy_weights: bool = False
    stats: Path | None = None
    trace: Path | None = None
    skip_invalid: bool = False
    overwrite: bool = False
    quiet: bool = False
    lora: tuple[tuple[str, Path], ...] = ()
    lora_dir: Path | None = None
    finetune: CoFinetune | None = None


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of ``flexbatch run``."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", required=True, help="a folder, a GGUF file, a hub id, a short name such as opt-30b, or demo"
    )
    files.add_argument("-i", "--input", required=True, metavar="FILE", help="rows in JSONL, - for stdin")
    files.add_argument("-o", "--output", required=True, metavar="FILE", type=Path, help="where the results go, JSONL")
    files.add_argument("--stats", metavar="FILE", type=Path, help="write what the run cost, JSON")
    files.add_argument("--trace", metavar="FILE", type=Path, help="write a timeline, Chrome trace format")
    files.add_argument("--skip-invalid", action="store_true", help="make invalid rows error rows (exit code 3)")
    files.add_argument("--overwrite", action="store_true", help="start anew, whatever output or .part is there")
    files.add_argument("--quiet", action="store_true", help="write nothing to stderr but errors")
    _add_generation(parser.add_argument_group("generation (a row's own values win)"))
    parser.add_argument("--plan", metavar="FILE", type=Path, help="place as a plan saved by flexbatch plan --json says")
    add_adapter_options(parser.add_argument_group("LoRA adapters (rows name them: lora, or body.model)"))
    add_engine_options(parser)


def run_options(values: argparse.Namespace) -> RunOptions:
    """Return the options that ``add_run_options`` parsed; UsageError names the one that is wrong."""
    params = SamplingParams(
        max_tokens=values.max_tokens,
        temperature=values.temperature,
        top_p=values.top_p,
        top_k=values.top_k,
        run_seed=values.seed,
        stop=tuple(values.stop),
        logprobs=values.logprobs,
        ignore_eos=values.ignore_eos,
    )
    return RunOptions(
        model=values.model,
        input=values.input,
        output=values.output,
        params=params,
        engine=planned_options(values),
        chat=values.chat,
        template=read_template(values.chat_template),
        dummy_weights=values.dummy_weights,
        stats=values.stats,
        trace=values.trace,
        skip_invalid=values.skip_invalid,
        overwrite=values.overwrite,
        quiet=values.quiet,
        lora=tuple(values.lora),
        lora_dir=checked_folder("--lora-dir", values.lora_dir),
    )


def planned_options(values: argparse.Namespace) -> EngineOptions:
    """Return the options of ``add_engine_options``, placed as ``--plan`` says if it is given."""
    engine = engine_options(values)
    if values.plan is None:
        return engine
    plan = load_plan(values.plan)
    if canonical(plan.model) != canonical(values.model):
        raise UsageError(f"--plan {values.plan}: is a plan for {plan.model}, not for {values.model}: save one for it")
    return plan.applied(engine)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options that say on what a run runs and where everything lives."""
    _add_machine(parser.add_argument_group("machine"))
    _add_placement(parser.add_argument_group("placement (auto: the plan decides; SHARES: gpu,cpu,disk in percent)"))


def engine_options(values: argparse.Namespace) -> EngineOptions:
    """Return the options that ``add_engine_options`` parsed; UsageError names the one that is wrong."""
    return EngineOptions(
        device=values.device,
        gpu_memory=values.gpu_memory,
        cpu_memory=values.cpu_memory,
        disk_memory=values.disk_memory,
        disk_dir=checked_folder("--disk-dir", values.disk_dir),
        weights=values.weights,
        kv=values.kv,
        hidden=values.hidden,
        cpu_attention=values.cpu_attention,
        weight_bits=values.weight_bits,
        kv_bits=values.kv_bits,
        micro_batch=values.micro_batch,
        max_sequences=values.max_sequences,
        schedule=values.schedule,
        overlap=not values.no_overlap,
        rates=dict(values.throttle),
        dtype=values.dtype,
        adapter_memory=getattr(values, "adapter_memory", None),
        share_prefixes=values.share_prefixes,
    )


def _add_generation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens a row (default 128)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: off")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="default 0: off")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="for rows without a seed (default 0)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    group.add_argument("--logprobs", type=int, metavar="K", help="log-probabilities, with those of the K likeliest")
    group.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    group.add_argument("--chat", action="store_true", help="put plain text prompts into the chat template, too")
    group.add_argument("--chat-template", metavar="FILE", type=Path, help="a Jinja template instead of the model's")


def add_adapter_options(group: argparse._ArgumentGroup, *, several: bool = True) -> None:
    """Give ``group`` the options that name adapters (or one adapter) and bound their memory."""
    group.add_argument(
        "--lora",
        metavar="NAME=DIR",
        action="append",
        default=[],
        type=_adapter,
        help="a PEFT folder; repeatable" if several else "a PEFT folder",
    )
    if several:
        group.add_argument("--lora-dir", metavar="DIR", type=Path, help="each sub-folder is an adapter, named after it")
    group.add_argument(
        "--adapter-memory",
        type=_size("--adapter-memory"),
        metavar="SIZE",
        help="of RAM, for adapters; more are read from disk when needed (default: what the plan leaves)",
    )


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """Give ``group`` the options that name a device and the disk, and slow their links down."""
    group.add_argument("--device", type=_device, default="auto", help="auto, cuda, cuda:N, cpu or sim (default auto)")
    group.add_argument("--gpu-memory", type=_size("--gpu-memory"), metavar="SIZE", help="default 90%% of what is free")
    group.add_argument("--disk-dir", metavar="DIR", type=Path, help="where the disk tier lies")
    group.add_argument(
        "--throttle",
        metavar="RESOURCE=SIZE",
        action="append",
        default=[],
        type=_rate,
        help="slow h2d or d2h (of sim), disk_read or disk_write down to SIZE bytes a second; repeatable",
    )


def device_options(values: argparse.Namespace) -> EngineOptions:
    """Return the options that ``add_device_options`` parsed, everything else at its default."""
    folder = checked_folder("--disk-dir", values.disk_dir)
    return EngineOptions(
        device=values.device, gpu_memory=values.gpu_memory, disk_dir=folder, rates=dict(values.throttle)
    )


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add_device_options(group)
    add_dtype_options(group)


def add_dtype_options(group: argparse._ArgumentGroup) -> None:
    """Give ``group`` the type of products, the budgets of RAM and disk, and made-up weights."""
    dtypes = ("auto", "float16", "bfloat16", "float32")
    group.add_argument("--dtype", choices=dtypes, default="auto", help="for compute, KV and hidden states")
    group.add_argument("--cpu-memory", type=_size("--cpu-memory"), metavar="SIZE", help="default 80%% of what is free")
    group.add_argument("--disk-memory", type=_size("--disk-memory"), metavar="SIZE", help="default: free less 10%%")
    group.add_argument("--dummy-weights", action="store_true", help="random weights in MODEL's shapes, for benchmarks")


def _add_placement(group: argparse._ArgumentGroup) -> None:
    for name, what in (("weights", "weights"), ("kv", "KV cache"), ("hidden", "hidden states")):
        option = f"--{name}"
        group.add_argument(
            option, type=shares_option(option), metavar="SHARES", help=f"placement of {what} (default auto)"
        )
    group.add_argument("--cpu-attention", type=_switch, metavar="on|off", help="attend on the CPU (default auto)")
    for name in ("--weight-bits", "--kv-bits"):
        group.add_argument(name, type=_bits(name), default=16, metavar="16|4|auto", help="default 16")
    group.add_argument("--micro-batch", type=_count("--micro-batch"), metavar="TOKENS", help="default auto")
    group.add_argument("--max-sequences", type=_count("--max-sequences"), metavar="N", help="default auto")
    schedules = ("continuous", "block")
    group.add_argument("--schedule", choices=schedules, default="continuous", help="block: FlexGen's fixed block")
    group.add_argument(
        "--share-prefixes",
        type=_on_off,
        default=True,
        metavar="on|off",
        help="compute what prompts begin with alike once (default on)",
    )
    group.add_argument("--no-overlap", action="store_true", help="run the steps of a sweep one after the other")


def _adapter(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise UsageError(f"--lora {text}: give NAME=DIR, such as french=adapters/french")
    return name, Path(folder)


def _rate(text: str) -> tuple[Resource, int]:
    name, _, size = text.partition("=")
    for resource in THROTTLED:
        if name == resource:
            with suppress(UsageError):
                rate = parse_size(size)
                if rate > 0:
                    return resource, rate
    raise UsageError(f"--throttle {text}: give one of {', '.join(THROTTLED)} and a size, such as disk_read=500MB")


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise UsageError(f"--device {text}: give auto, cuda, cuda:N, cpu or sim")
    return text


def _size(option: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            return parse_size(text)
        except UsageError as error:
            raise UsageError(f"{option}: {error}") from None

    return parse


def shares_option(option: str) -> Callable[[str], Shares | None]:
    """Return what reads the value of ``option``, three percentages or ``auto``."""
    return lambda text: None if text == "auto" else parse_shares(text, option)


def _switch(text: str) -> bool | None:
    values = {"on": True, "off": False, "auto": None}
    if text not in values:
        raise UsageError(f"--cpu-attention {text}: give on, off or auto")
    return values[text]


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"--share-prefixes {text}: give on or off")
    return text == "on"


def _bits(option: str) -> Callable[[str], Literal[16, 4] | None]:
    values: dict[str, Literal[16, 4] | None] = {"16": 16, "4": 4, "auto": None}

    def parse(text: str) -> Literal[16, 4] | None:
        if text not in values:
            raise UsageError(f"{option} {text}: give 16, 4 or auto")
        return values[text]

    return parse


def count_option(option: str) -> Callable[[str], int]:
    """Return what reads the value of ``option``, a whole number from 1 on."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
            raise UsageError(f"{option} {text}: give a whole number from 1 on")
        return int(text)

    return parse


def _count(option: str) -> Callable[[str], int | None]:
    def parse(text: str) -> int | None:
        if text == "auto":
            return None
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
            raise UsageError(f"{option} {text}: give a whole number from 1 on, or auto")
        return int(text)

    return parse


def checked_folder(option: str, path: Path | None) -> Path | None:
    """Return ``path``; UsageError, naming ``option``, if it is given and no folder."""
    if path is not None and not path.is_dir():
        raise UsageError(f"{option} {path}: is no folder: make it first, or choose another")
    return path


def read_template(path: Path | None) -> str | None:
    """Return the text of a ``--chat-template``, or None without one; UsageError if it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--chat-template {path}: cannot be read ({error.strerror}): give a Jinja file") from None
    except UnicodeDecodeError:
        raise UsageError(f"--chat-template {path}: is not UTF-8: give a Jinja file") from None
