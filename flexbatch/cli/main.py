"""The program: parses the command line, runs a command, and turns what went wrong into one line and an exit code.

Knows no command from the inside; what a mistake costs is a fraction of a second, for nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from flexbatch import __version__
from flexbatch.cli.backend import Backend
from flexbatch.cli.console import print_error
from flexbatch.cli.convert import add_convert_options, run_convert
from flexbatch.cli.finetune import run_finetune
from flexbatch.cli.finetune_options import (
    add_cofinetune_options,
    add_finetune_options,
    cofinetune_options,
    finetune_command,
)
from flexbatch.cli.info import add_info_options, run_info
from flexbatch.cli.lm_eval import add_lm_eval_options, run_lm_eval
from flexbatch.cli.options import add_run_options, run_options
from flexbatch.cli.plan import add_plan_options, run_plan
from flexbatch.cli.profile import add_profile_options, run_profile
from flexbatch.cli.run import run_job
from flexbatch.errors import ExitCode, FlexbatchError, UsageError


def main(argv: Sequence[str] | None = None, backend: Backend | None = None) -> int:
    """Run the program with ``argv`` (default: the process's own arguments) and return its exit code."""
    program = ["flexbatch"] if argv is not None else _program()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        values = _parser().parse_args(arguments)
        if values.command == "info":
            code = run_info(values)
        elif values.command == "profile":
            code = run_profile(values)
        elif values.command == "plan":
            code = run_plan(values)
        elif values.command == "finetune":
            code = run_finetune(finetune_command(values), backend or Backend(), [*program, *arguments])
        elif values.command == "convert":
            code = run_convert(values, [*program, *arguments])
        elif values.command == "lm-eval":
            code = run_lm_eval(values, [*program, *arguments])
        else:
            options = run_options(values)
            options = replace(options, finetune=cofinetune_options(values, options.engine))
            code = run_job(options, backend or Backend(), [*program, *arguments])
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except Exception as error:  # noqa: BLE001  (the last resort: whatever it is gets its exit code)
        return _report(error)


def entry() -> NoReturn:
    """Run as the console script ``flexbatch``."""
    sys.exit(main())


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flexbatch",
        description="Batch generation with language models larger than the GPU, or without one.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"flexbatch {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="generate for every row of a file", allow_abbrev=False)
    add_run_options(run)
    add_cofinetune_options(run)
    plan = commands.add_parser("plan", help="say what a run would do, how fast, and why", allow_abbrev=False)
    add_plan_options(plan)
    profile = commands.add_parser("profile", help="measure this machine for plans", allow_abbrev=False)
    add_profile_options(profile)
    finetune = commands.add_parser("finetune", help="train a LoRA adapter", allow_abbrev=False)
    add_finetune_options(finetune)
    convert = commands.add_parser("convert", help="prepare a model ahead of runs", allow_abbrev=False)
    add_convert_options(convert)
    lm_eval = commands.add_parser("lm-eval", help="evaluate on tasks of lm-evaluation-harness", allow_abbrev=False)
    add_lm_eval_options(lm_eval)
    info = commands.add_parser("info", help="say what a model is and what it takes", allow_abbrev=False)
    add_info_options(info)
    return parser


def _program() -> list[str]:
    # What the user typed, so that a resume command can be pasted.
    if Path(sys.argv[0]).name == "__main__.py":
        return [sys.executable, "-m", "flexbatch"]
    return [sys.argv[0]]


def _report(error: Exception) -> ExitCode:
    notes = "; ".join(getattr(error, "__notes__", []))
    if isinstance(error, FlexbatchError) and error.exit_code is not ExitCode.FAULT:
        print_error(f"flexbatch: error: {error}" + (f"; {notes}" if notes else ""))
        return error.exit_code
    shortage = _shortage(error)
    if shortage:
        print_error(f"flexbatch: error: {shortage}" + (f"; {notes}" if notes else ""))
        return ExitCode.DOES_NOT_FIT
    print_error("".join(traceback.format_exception(error)).rstrip())
    print_error(f"flexbatch: error: a fault of flexbatch {__version__}: please report it with the lines above")
    return ExitCode.FAULT


def _shortage(error: Exception) -> str:
    """Say what ran out, or return nothing if the error is of another kind."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({text}): free some space"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return f"the machine's memory ran out ({text}): lower --cpu-memory or --max-sequences"
    # torch raises its own types, which must not be imported for this.
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory ran out ({text}): lower --gpu-memory or --max-sequences"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"the machine's memory ran out ({text}): lower --cpu-memory or --max-sequences"
    return ""
