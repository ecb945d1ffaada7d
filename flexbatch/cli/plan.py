"""``flexbatch plan``: what a run would do on this machine or another, and why; loads no weights and runs nothing."""

from __future__ import annotations

import argparse
import json
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flexbatch.cli.console import Console
from flexbatch.cli.finetune_options import add_cofinetune_options, cofinetune_options
from flexbatch.cli.options import add_engine_options, count_option, engine_options
from flexbatch.cli.plan_table import plan_table
from flexbatch.cli.progress import LoadMeter
from flexbatch.errors import ExitCode, ModelError, UsageError
from flexbatch.jobs.output import check_place
from flexbatch.options import EngineOptions

if TYPE_CHECKING:
    from flexbatch.checkpoint.locate import ModelFolder
    from flexbatch.checkpoint.tensors import Checkpoint
    from flexbatch.models.spec import WeightTable
    from flexbatch.policy.candidates import Shop
    from flexbatch.policy.machine import Machine
    from flexbatch.policy.profile import HardwareProfile
    from flexbatch.policy.workload import Workload
    from flexbatch.requests import Request
    from flexbatch.text.codec import TextCodec

PROMPT_LEN, GEN_LEN, REQUESTS = 512, 128, 1000
_TEXT_BYTES = 4  # of English a token, where there is no tokenizer to ask


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of ``flexbatch plan``."""
    parser.add_argument("--model", required=True, help="a folder, a hub id, a short name such as opt-30b, or demo")
    parser.add_argument("--json", action="store_true", help="write JSON, which run --plan takes")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw roofline and timeline (PNG, SVG or PDF)")
    parser.add_argument("--quiet", action="store_true", help="write nothing to stderr but errors")
    workload = parser.add_argument_group("workload")
    for name, default, what in (
        ("--prompt-len", PROMPT_LEN, "prompt tokens of a row"),
        ("--gen-len", GEN_LEN, "new tokens of a row"),
        ("--num-requests", REQUESTS, "rows"),
    ):
        workload.add_argument(name, type=count_option(name), metavar="N", help=f"{what} (default {default})")
    workload.add_argument("-i", "--input", metavar="FILE", help="take the rows of FILE (JSONL) instead")
    workload.add_argument("--max-tokens", type=int, metavar="N", help="with --input: new tokens a row (default 128)")
    workload.add_argument("--chat", action="store_true", help="with --input: put text prompts into the chat template")
    parser.add_argument(
        "--profile", metavar="FILE|NAME", help="plan for the machine of a profile, or a shipped one such as t4"
    )
    add_engine_options(parser)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)  # changes no plan
    add_cofinetune_options(parser)


def run_plan(values: argparse.Namespace) -> ExitCode:
    """Print the plan, as a table or as JSON, and draw it on demand."""
    options = engine_options(values)
    finetune = cofinetune_options(values, options, writes=False)
    given = [name for name in ("prompt_len", "gen_len", "num_requests") if getattr(values, name) is not None]
    if values.input is not None and given:
        raise UsageError(f"--{given[0].replace('_', '-')}: the rows of --input have lengths: give one of the two")
    for name in ("max_tokens", "chat"):
        if values.input is None and getattr(values, name):
            raise UsageError(
                f"--{name.replace('_', '-')}: goes with --input; without it, give --prompt-len and --gen-len"
            )
    if values.plot is not None:
        check_place("--plot", values.plot)
        from flexbatch.cli.plan_figure import require_matplotlib

        require_matplotlib(values.plot)
    from flexbatch.checkpoint.locate import locate

    console = Console(quiet=values.quiet)
    folder = locate(values.model, dummy=True)
    for warning in folder.warnings:
        console.warn(warning)
    workload = _workload(values, options, folder, console)
    profile, machine = _machine(values, options, folder, console)
    beside = None
    if finetune is not None:
        from flexbatch.cli.plan_finetune import FinetunePlanner

        beside = FinetunePlanner(finetune, folder, _codec(values.model, folder), options, machine)
        machine = beside.left
    shop = shop_of(folder, workload, options, machine, profile)
    from flexbatch.policy.search import choose
    from flexbatch.policy.whatif import look_into

    plan, placement = choose(
        shop.name,
        shop.size,
        shop.units,
        workload,
        options,
        machine,
        profile,
        stored_dtype=shop.stored_dtype,
    )
    insight = look_into(shop, plan, placement, timeline=values.plot is not None)
    found = plan.to_json() | {"gains": insight.to_json()}
    if beside is not None:
        found["finetune"] = beside.figures(shop, plan, placement)
    print(json.dumps(found, ensure_ascii=False, indent=1) if values.json else plan_table(found, insight))
    if values.plot is not None:
        from flexbatch.cli.plan_figure import draw

        draw(values.plot, plan, shop, insight.events)
        console.say(f"{values.plot}: roofline and timeline")
    return ExitCode.DONE


def _workload(values: argparse.Namespace, options: EngineOptions, folder: ModelFolder, console: Console) -> Workload:
    from flexbatch.policy.workload import Workload

    if values.input is not None:
        return _rows(values, options, folder, console)
    longest = folder.shape.max_positions
    prompt, new = values.prompt_len or min(PROMPT_LEN, longest // 2), values.gen_len or min(GEN_LEN, longest // 4)
    if prompt > longest:
        raise UsageError(f"--prompt-len {prompt}: {folder.name} has a window of {longest} tokens: give fewer")
    return Workload.uniform(prompt, new, values.num_requests or REQUESTS)


def _rows(values: argparse.Namespace, options: EngineOptions, folder: ModelFolder, console: Console) -> Workload:
    """The lengths of the input's rows: exact with the model's tokenizer, else estimated from the text.

    What prompts share is known only in tokens.
    """
    from flexbatch.jobs.rows import read_rows, require_valid
    from flexbatch.policy.workload import Workload
    from flexbatch.requests import TokenizedRequest
    from flexbatch.sampling import SamplingParams
    from flexbatch.text.prompts import PromptEncoder

    job = read_rows(
        values.input, SamplingParams(max_tokens=GEN_LEN if values.max_tokens is None else values.max_tokens)
    )
    require_valid(job.name, job.rows)
    requests = [row.request for row in job.rows if row.request is not None]
    if not requests:
        raise UsageError(f"--input {values.input}: has no rows: there is nothing to plan")
    codec = _codec(values.model, folder)
    if codec is None and any(not isinstance(request.prompt, tuple) for request in requests):
        console.warn(f"{folder.name} has no tokenizer here: one token for every {_TEXT_BYTES} bytes of text is assumed")
        prompts = [_guess(request) for request in requests]
    else:
        encoded = PromptEncoder(codec, folder.shape, chat=values.chat, template=None).encode_all(requests)
        rows = [
            row.failed(tokens) if isinstance(tokens, str) else row
            for row, tokens in zip(job.rows, encoded, strict=True)
        ]
        require_valid(job.name, rows)
        if max(map(len, encoded)) <= folder.shape.max_positions:
            known = [
                TokenizedRequest(request, index, tokens)
                for index, (request, tokens) in enumerate(zip(requests, encoded, strict=True))
                if not isinstance(tokens, str)
            ]
            return Workload.of(known, share_prefixes=options.share_prefixes)
        prompts = [len(tokens) for tokens in encoded]
    limit = folder.shape.max_positions
    prompts = [min(prompt, limit) for prompt in prompts]
    return Workload(tuple(prompts), tuple(request.params.max_tokens for request in requests))


def _codec(model: str, folder: ModelFolder) -> TextCodec | None:
    """The model's tokenizer: from its folder, or from the hub where only its configuration is in the package."""
    from flexbatch.checkpoint.hub import SHORT_NAMES, fetch
    from flexbatch.text.codec import TextCodec

    found = TextCodec.load_if_present(folder.path)
    if found is None and not Path(model).expanduser().is_dir():
        with suppress(ModelError):
            found = TextCodec.load_if_present(fetch(model, SHORT_NAMES.get(model.lower(), model), weights=False))
    return found


def _guess(request: Request) -> int:
    if isinstance(request.prompt, tuple):
        return len(request.prompt)
    texts = [request.prompt] if isinstance(request.prompt, str) else [str(m) for m in request.messages or ()]
    return max(1, sum(len(text.encode()) for text in texts) // _TEXT_BYTES)


def _machine(
    values: argparse.Namespace, options: EngineOptions, folder: ModelFolder, console: Console
) -> tuple[HardwareProfile, Machine]:
    """The profile and what a plan may use of it: of the one that was named, or of this machine."""
    stored = folder.shape.stored_dtype
    if values.profile is not None:
        from flexbatch.policy.machines import load_profile, machine_of

        profile = load_profile(values.profile)
        return profile, machine_of(profile, options, stored)
    from flexbatch.runtime.profile_cache import machine_profile
    from flexbatch.runtime.setup import disk_folder, machine_for, open_device

    with closing(open_device(options)) as device, closing(LoadMeter(console)) as meter:
        machine = machine_for(options, device, stored)
        found = machine_profile(
            device, disk_folder(options), rates=options.rates, types=(machine.dtype,), progress=meter
        )
    return found, machine


def shop_of(
    folder: ModelFolder, workload: Workload, options: EngineOptions, machine: Machine, profile: HardwareProfile
) -> Shop:
    """All that a plan depends on, from a model's configuration: no weights are read."""
    from flexbatch.models.registry import family_of
    from flexbatch.models.spec import model_size
    from flexbatch.policy.candidates import Shop
    from flexbatch.runtime.units import unit_sizes, units_of

    shape = folder.shape
    table = family_of(shape).table(shape)
    units = unit_sizes(units_of(table, _checkpoint(folder, table), shape.vocab_size))
    size = model_size(shape, table)
    return Shop(folder.name, size, tuple(units), workload, options, machine, profile, shape.stored_dtype)


def _checkpoint(folder: ModelFolder, table: WeightTable) -> Checkpoint:
    """The sizes of the weights, as they are stored: a configuration says enough of them, a GGUF file itself."""
    from flexbatch.checkpoint.dummy import dummy_checkpoint
    from flexbatch.checkpoint.four_bits import open_weights
    from flexbatch.checkpoint.packed import packable
    from flexbatch.config_quantization import read_quantization

    if folder.path.is_file():
        return open_weights(replace(folder, dummy=False), table)
    found = dummy_checkpoint(folder, table)
    quantization = read_quantization(folder.shape.architecture, folder.config)
    if quantization is None:
        return found
    shapes = {name: kind.shape for name, kind in packable(table).items()}
    return found.kept_packed(shapes, quantization.group, "minimum" if quantization.method == "flexbatch" else "zero")
