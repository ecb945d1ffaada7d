"""The errors a user can cause, and the exit code each one ends with.

FlexbatchError                 exit code
├── UsageError                 2   wrong option, wrong value
├── InputError                 2   the input file or its rows
├── ModelError                 2   unreadable or unsupported model, tokenizer or template
├── AdapterError               2   unreadable or unsupported adapter
├── DivergedError              2   a training whose numbers are no longer finite
├── DoesNotFitError            4   a tier is too small; a disk is full
└── InternalError              1   a fault of flexbatch itself

Anything else that escapes is a fault of flexbatch (exit code 1). This module knows nothing of streams.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the program's exit status means (see the contract in ``docs/cli.md``)."""

    DONE = 0
    FAULT = 1
    USAGE = 2
    ROWS_FAILED = 3
    DOES_NOT_FIT = 4
    INTERRUPTED = 130
    TERMINATED = 143


class FlexbatchError(Exception):
    """One clear line: what happened, where, and what to do about it."""

    exit_code: ExitCode = ExitCode.FAULT


class InternalError(FlexbatchError):
    """An invariant of flexbatch was broken; finished rows are kept."""


class UsageError(FlexbatchError):
    """A wrong option or value."""

    exit_code = ExitCode.USAGE


class InputError(FlexbatchError):
    """The input file, or some of its rows, cannot be used."""

    exit_code = ExitCode.USAGE


class ModelError(FlexbatchError):
    """The model cannot be found, read or is not supported."""

    exit_code = ExitCode.USAGE


class AdapterError(FlexbatchError):
    """A LoRA adapter cannot be found, read or is not supported."""

    exit_code = ExitCode.USAGE


class DivergedError(FlexbatchError):
    """The loss, the gradients or the adapter of a training are no longer finite; what was good before is kept."""

    exit_code = ExitCode.USAGE


class DoesNotFitError(FlexbatchError):
    """A tier is too small, before or during the run.

    ``tier`` names it, ``missing`` is how many bytes more it would need, ``remedy`` the option that would help.
    """

    exit_code = ExitCode.DOES_NOT_FIT

    def __init__(self, message: str, *, tier: str, missing: int, remedy: str) -> None:
        super().__init__(message)
        self.tier = tier
        self.missing = missing
        self.remedy = remedy
