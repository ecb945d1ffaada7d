"""Input rows: a JSONL file, or standard input, becomes numbered Requests, each bad line with its reason.

Knows nothing of tokenizers and models: lengths in tokens are checked by whoever encodes the prompts.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from flexbatch.errors import InputError
from flexbatch.jobs.fields import BadRowError, Json, show
from flexbatch.jobs.native import parse_native
from flexbatch.jobs.openai import Endpoint, is_openai, parse_openai
from flexbatch.requests import Request
from flexbatch.sampling import SamplingParams

LISTED = 20  # how many bad lines an error lists before it only counts them
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One non-blank line of the input.

    ``index``: its place among the rows, from 0. ``line``: its number in the file, from 1. ``digest``: a hash of its
    bytes, hexadecimal. ``endpoint``: None for a native row. Exactly one of ``request`` and ``error`` is set.
    """

    index: int
    line: int
    id: str
    digest: str
    endpoint: Endpoint | None = None
    request: Request | None = None
    error: str | None = None

    def failed(self, reason: str) -> Row:
        """Return the row as an invalid one."""
        return replace(self, request=None, error=reason)


@dataclass(frozen=True, slots=True)
class JobInput:
    """All rows of one input. ``name`` is for messages; ``digest`` is the SHA-256 of its bytes."""

    name: str
    digest: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Names:
    """What rows may name: the job's adapters, and the base model as ``--model`` calls it."""

    adapters: Collection[str] = ()
    model: str = ""


_NO_NAMES = Names()


def read_rows(source: str, defaults: SamplingParams, names: Names = _NO_NAMES) -> JobInput:
    """Return the rows of the file ``source``, or of standard input for ``-``; a row's own values win over ``defaults``.

    Bad lines become rows with an error (see :func:`require_valid`). Raises InputError if the file cannot be read or
    holds no row.
    """
    name = "standard input" if source == "-" else source
    if source == "-" and sys.stdin is None:
        raise InputError("standard input is closed: give --input a JSONL file")
    try:
        with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as stream:
            job = _parse(name, stream, defaults, names)
    except FileNotFoundError:
        raise InputError(f"{source}: no such file: give --input a JSONL file, or - for standard input") from None
    except IsADirectoryError:
        raise InputError(f"{source}: is a folder: give --input a JSONL file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{source}: cannot be read ({reason}): check --input") from None
    if not job.rows:
        raise InputError(f"{name}: holds no rows: write one JSON object a line")
    return job


def require_valid(name: str, rows: Sequence[Row]) -> None:
    """Raise InputError listing the first bad rows, with line number and reason, and how many more there are."""
    bad = [(row.line, row.error) for row in rows if row.error is not None]
    if bad:
        raise invalid_rows(name, len(rows), bad, "correct them, or give --skip-invalid to go on without")


def invalid_rows(name: str, total: int, bad: Sequence[tuple[int, str]], remedy: str) -> InputError:
    """Return the error that lists the first of the ``bad`` rows (line, reason) out of ``total``."""
    lines = [f"{name}: {len(bad)} of {total} rows invalid: {remedy}"]
    lines += [f"  line {line}: {reason}" for line, reason in bad[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"  and {len(bad) - LISTED} more")
    return InputError("\n".join(lines))


def _parse(name: str, stream: BinaryIO, defaults: SamplingParams, names: Names) -> JobInput:
    digest = hashlib.sha256()
    rows: list[Row] = []
    lines_of: dict[str, int] = {}
    for number, raw in enumerate(stream, start=1):
        digest.update(raw)
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if not line.strip():
            continue
        row = _parse_line(line.rstrip(b"\r\n"), len(rows), number, defaults, names)
        if row.error is None:
            first = lines_of.setdefault(row.id, number)
            if first != number:
                row = row.failed(f"duplicate id {show(row.id)}, first on line {first}")
        rows.append(row)
    return JobInput(name, digest.hexdigest(), tuple(rows))


def _parse_line(line: bytes, index: int, number: int, defaults: SamplingParams, names: Names) -> Row:
    blank = Row(index, number, str(number), hashlib.blake2b(line, digest_size=12).hexdigest())
    try:
        value = load_object(line)
    except BadRowError as bad:
        return blank.failed(str(bad))
    endpoint: Endpoint | None = None
    try:
        if is_openai(value):
            request, endpoint = parse_openai(value, defaults, names.adapters, names.model)
        else:
            request = parse_native(value, str(number), defaults, names.adapters)
    except BadRowError as bad:
        return _identified(blank, value).failed(str(bad))
    return replace(blank, id=request.id, endpoint=endpoint, request=request)


def _identified(row: Row, value: dict[str, Json]) -> Row:
    # An invalid row keeps its own id, and answers in its own format, as far as it has them.
    name = value.get("custom_id") if is_openai(value) else value.get("id")
    endpoint: Endpoint | None = "completion" if is_openai(value) else None
    return replace(row, id=name if isinstance(name, str) and name else row.id, endpoint=endpoint)


def load_object(line: bytes) -> dict[str, Json]:
    """Return the JSON object on one line; BadRowError says what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise BadRowError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadRowError(f"not JSON ({reason})") from None
    if not isinstance(value, dict):
        raise BadRowError(f"must be an object, not {show(value)}")
    if "\\u" in text and _holds_surrogate(value):
        raise BadRowError("holds half a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def _refuse_constant(name: str) -> Json:
    raise BadRowError(f"not JSON (it holds {name})")


def _unique(pairs: Iterable[tuple[str, Json]]) -> dict[str, Json]:
    row: dict[str, Json] = {}
    for name, value in pairs:
        if name in row:
            raise BadRowError(f"gives {show(name)} twice")
        row[name] = value
    return row


def _holds_surrogate(value: Json) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
