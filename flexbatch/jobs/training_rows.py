"""Rows to train on: a JSONL file becomes texts, completions and chats, each bad line with its reason.

Knows nothing of tokenizers and models; which tokens the loss is over is said where the rows are encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexbatch.errors import InputError
from flexbatch.jobs.fields import BadRowError, Json, messages_field, prompt_field, refuse_unknown
from flexbatch.jobs.rows import invalid_rows, load_object

_FORMS = "text, prompt and completion, or messages"
_FIELDS = frozenset({"id", "text", "prompt", "completion", "messages"})
_BOM = b"\xef\xbb\xbf"

Content = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """All of it is learned."""

    text: Content


@dataclass(frozen=True, slots=True)
class Completion:
    """The completion is learned, the prompt is read."""

    prompt: Content
    completion: Content


@dataclass(frozen=True, slots=True)
class Chat:
    """What the assistant says is learned, everything else is read."""

    messages: tuple[Mapping[str, Json], ...]


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One non-blank line; ``line`` is its number in the file, from 1. One of ``content`` and ``error`` is set."""

    line: int
    content: Text | Completion | Chat | None
    error: str | None = None

    def failed(self, reason: str) -> TrainingRow:
        """Return the row as an invalid one."""
        return replace(self, content=None, error=reason)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """All rows of one file. ``name`` is for messages; ``digest`` is the SHA-256 of the bytes."""

    name: str
    digest: str
    rows: tuple[TrainingRow, ...]

    def require_valid(self) -> None:
        """Raise InputError listing the first bad rows, with line number and reason, and how many more there are."""
        bad = [(row.line, row.error) for row in self.rows if row.error is not None]
        if bad:
            raise invalid_rows(self.name, len(self.rows), bad, "correct them, or leave them out")

    def with_faults(self, faults: Sequence[str | None]) -> TrainingData:
        """Return the data with the rows invalid for which there is a reason."""
        rows = (row if fault is None else row.failed(fault) for row, fault in zip(self.rows, faults, strict=True))
        return replace(self, rows=tuple(rows))


def read_training_rows(path: Path, option: str = "--data") -> TrainingData:
    """Return the rows of the JSONL file that ``option`` names; bad ones have an error.

    Raises InputError if it cannot be read or holds no row.
    """
    digest = hashlib.sha256()
    rows: list[TrainingRow] = []
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                digest.update(raw)
                line = raw.removeprefix(_BOM) if number == 1 else raw
                if line.strip():
                    rows.append(_parse_line(line.rstrip(b"\r\n"), number))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: give {option} a JSONL file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder: give {option} a JSONL file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check {option}") from None
    if not rows:
        raise InputError(f"{path}: holds no rows: write one JSON object a line")
    return TrainingData(str(path), digest.hexdigest(), tuple(rows))


def training_rows(values: Iterable[Mapping[str, Json]]) -> TrainingData:
    """Return rows that are objects already, as if each stood on a line of its own. InputError if there are none."""
    digest = hashlib.sha256()
    rows: list[TrainingRow] = []
    for number, value in enumerate(values, start=1):
        try:
            line = json.dumps(dict(value), ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            rows.append(TrainingRow(number, None, f"is no JSON object ({error})"))
            continue
        digest.update(line + b"\n")
        rows.append(_parse_line(line, number))
    if not rows:
        raise InputError("data: holds no rows: give at least one")
    return TrainingData("data", digest.hexdigest(), tuple(rows))


def _parse_line(line: bytes, number: int) -> TrainingRow:
    try:
        return TrainingRow(number, parse_training_row(load_object(line)))
    except BadRowError as bad:
        return TrainingRow(number, None, str(bad))


def parse_training_row(row: Mapping[str, Json]) -> Text | Completion | Chat:
    """Return what one row is; a field that is null counts as not given. Raises BadRowError."""
    refuse_unknown(row, _FIELDS)
    given = {name: value for name, value in row.items() if value is not None and name != "id"}
    if given.keys() == {"text"}:
        return Text(prompt_field(given["text"], name="text"))
    if given.keys() == {"prompt", "completion"}:
        return Completion(prompt_field(given["prompt"]), prompt_field(given["completion"], name="completion"))
    if given.keys() == {"messages"}:
        messages = messages_field(given["messages"])
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRowError("messages has no assistant turn: there is nothing to learn")
        return Chat(messages)
    raise BadRowError(f"needs {_FORMS}; it has {', '.join(given) or 'none of them'}")
