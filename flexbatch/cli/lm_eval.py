"""``flexbatch lm-eval``: tasks of lm-evaluation-harness, each kind of request as one batch; an interrupted one resumes.

Says what is evaluated and where results go; how requests are answered stands in ``evaluation/``.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flexbatch.cli.backend import Backend
from flexbatch.cli.console import Console, print_error
from flexbatch.cli.options import (
    add_adapter_options,
    add_engine_options,
    checked_folder,
    count_option,
    planned_options,
    read_template,
)
from flexbatch.cli.progress import LoadMeter
from flexbatch.cli.report import write_stats
from flexbatch.cli.signals import Interrupted, interruptible
from flexbatch.errors import ExitCode, UsageError
from flexbatch.jobs.output import check_distinct, check_place, part_path
from flexbatch.lora.folders import adapter_folders, fingerprint
from flexbatch.options import EngineOptions


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """Everything ``flexbatch lm-eval`` was asked for. ``template`` is a chat template's text, not its file."""

    model: str
    tasks: tuple[str, ...]
    engine: EngineOptions
    include: Path | None = None
    output: Path | None = None
    samples: Path | None = None
    stats: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    generation: Mapping[str, Any] | None = None
    system: str | None = None
    single_turn: bool = False
    chat: bool = False
    template: str | None = None
    seed: int = 0
    max_length: int | None = None
    bootstrap: int = 1000
    lora: tuple[str, Path] | None = None
    dummy_weights: bool = False
    overwrite: bool = False
    quiet: bool = False


def add_lm_eval_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of ``flexbatch lm-eval``."""
    parser.add_argument(
        "--model", required=True, help="a folder, a GGUF file, a hub id, a short name such as opt-30b, or demo"
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", required=True, metavar="NAMES", help="tasks or groups, separated by commas")
    tasks.add_argument("--include-path", metavar="DIR", type=Path, help="more tasks: YAML files, such as of local data")
    tasks.add_argument("--num-fewshot", type=_number("--num-fewshot"), metavar="N", help="examples in each prompt")
    tasks.add_argument("--limit", type=_limit, metavar="N", help="documents a task; below 1: a share of them")
    tasks.add_argument("--gen-kwargs", metavar="K=V,...", help="settings that win over those of generating tasks")
    tasks.add_argument("--max-length", type=count_option("--max-length"), metavar="N", help="use a shorter window")
    tasks.add_argument("--seed", type=int, default=0, metavar="S", help="of sampled requests (default 0)")
    tasks.add_argument(
        "--bootstrap", type=_number("--bootstrap"), default=1000, metavar="N", help="draws for errors (default 1000)"
    )
    chats = parser.add_argument_group("chats")
    chats.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    chats.add_argument("--chat-template", metavar="FILE", type=Path, help="a Jinja template instead of the model's")
    chats.add_argument("--system-instruction", metavar="TEXT", help="the chat's first message, or the prompt's start")
    chats.add_argument("--fewshot-single-turn", action="store_true", help="examples within one message, not as turns")
    files = parser.add_argument_group("files")
    files.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="results, JSON; answers until then, to go on from: FILE.part*"
    )
    files.add_argument("--samples", metavar="FILE", type=Path, help="every document with its answers, JSONL")
    files.add_argument("--stats", metavar="FILE", type=Path, help="write what the run cost, JSON")
    files.add_argument("--overwrite", action="store_true", help="start anew, whatever output or answers are there")
    files.add_argument("--quiet", action="store_true", help="write nothing to stderr but errors")
    parser.add_argument("--plan", metavar="FILE", type=Path, help="place as a plan saved by flexbatch plan --json says")
    add_adapter_options(parser.add_argument_group("LoRA adapter (if given, it answers)"), several=False)
    add_engine_options(parser)


def run_lm_eval(values: argparse.Namespace, command: Sequence[str]) -> ExitCode:
    """Evaluate, print the harness's table, and write what was asked for; ``command`` is shown for resuming."""
    options = _options(values)
    _check_places(options)
    adapters = adapter_folders([] if options.lora is None else [options.lora], None)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError(
            "lm-eval needs lm-evaluation-harness: install it with pip install 'flexbatch[lm-eval]'"
        ) from None
    from flexbatch.api import LLM
    from flexbatch.evaluation.harness import Harness

    console = Console(quiet=options.quiet)
    backend = Backend()
    folder = backend.locate(options.model, dummy=options.dummy_weights)
    identity = {
        "model": backend.fingerprint(folder),
        "dtype": options.engine.dtype,
        "weight_bits": options.engine.weight_bits,
        "kv_bits": options.engine.kv_bits,
        "adapter": fingerprint(adapters, adapters) if adapters else None,
        "max_length": options.max_length,
        "seed": options.seed,
        "dummy_weights": options.dummy_weights,
    }
    # Before the weights: a wrong name costs little.
    harness = Harness(
        options.tasks,
        include=options.include,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        generation=options.generation,
        chat=options.chat,
        system=options.system,
        multiturn=not options.single_turn,
        bootstrap=options.bootstrap,
        seed=options.seed,
    )
    placed = {each.name: getattr(options.engine, each.name) for each in fields(options.engine)}
    try:
        with interruptible(), closing(LoadMeter(console)) as meter, redirect_stdout(sys.stderr):
            llm = LLM(options.model, **placed, dummy_weights=options.dummy_weights, progress=meter, lora=adapters)
            with llm:
                results = harness.evaluate(
                    llm,
                    name=options.model,
                    lora=None if options.lora is None else options.lora[0],
                    template=options.template,
                    max_length=options.max_length,
                    answers=None if options.output is None else part_path(options.output),
                    identity=identity,
                    fresh=options.overwrite,
                    quiet=options.quiet,
                )
                stats = llm.stats() if results.computed else None
    except Interrupted as interrupted:
        print_error("flexbatch: interrupted" + ("" if options.output is None else "; finished answers are kept"))
        if options.output is not None:
            print_error(f"continue with:\n  {shlex.join(word for word in command if word != '--overwrite')}")
        return interrupted.exit_code
    if options.samples is not None:
        results.write_samples(options.samples)
    if options.stats is not None:
        write_stats(options.stats, stats or {"requests": 0})
    if options.output is not None:
        results.write(options.output, asdict(options))
    results.forget_answers()
    print(results.table())
    return ExitCode.DONE


def _options(values: argparse.Namespace) -> EvaluationOptions:
    if len(values.lora) > 1:
        raise UsageError("--lora: one adapter answers all requests: give it once, and run once for each")
    names = tuple(name.strip() for name in values.tasks.split(",") if name.strip())
    if not names:
        raise UsageError("--tasks: names no task: give one or more, separated by commas")
    return EvaluationOptions(
        model=values.model,
        tasks=names,
        engine=planned_options(values),
        include=checked_folder("--include-path", values.include_path),
        output=values.output,
        samples=values.samples,
        stats=values.stats,
        num_fewshot=values.num_fewshot,
        limit=values.limit,
        generation=_generation(values.gen_kwargs),
        system=values.system_instruction,
        single_turn=values.fewshot_single_turn,
        chat=values.chat,
        template=read_template(values.chat_template),
        seed=values.seed,
        max_length=values.max_length,
        bootstrap=values.bootstrap,
        lora=values.lora[0] if values.lora else None,
        dummy_weights=values.dummy_weights,
        overwrite=values.overwrite,
        quiet=values.quiet,
    )


def _check_places(options: EvaluationOptions) -> None:
    places = {"--output": options.output, "--samples": options.samples, "--stats": options.stats}
    given = {option: place for option, place in places.items() if place is not None}
    for option, place in given.items():
        check_place(option, place)
        if place.exists() and not options.overwrite:
            raise UsageError(f"{option} {place}: exists: choose another name, or replace it with --overwrite")
    check_distinct(given)


def _generation(text: str | None) -> dict[str, Any] | None:
    """``K=V,K=V`` as a mapping; numbers and truth values are read as such."""
    if text is None:
        return None
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name.strip() and equals):
            raise UsageError(f"--gen-kwargs {text}: give K=V,K=V, such as max_gen_toks=64,temperature=0.7")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(option: str) -> Any:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise UsageError(f"{option} {text}: give a whole number from 0 on")
        return int(text)

    return parse


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9 or (value >= 1 and value != int(value)):
        raise UsageError(f"--limit {text}: give a number of documents, or a share of them between 0 and 1")
    return value if value < 1 else int(value)
