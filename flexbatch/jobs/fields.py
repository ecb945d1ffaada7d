"""Checks that both row formats share: types of fields, prompts, messages and sampling values.

Knows no file and no line numbers; a bad field raises :class:`BadRowError`, and the caller says where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from flexbatch.errors import UsageError
from flexbatch.sampling import SamplingParams

Json = Any


class BadRowError(Exception):
    """Why one row cannot be used; the text names the field."""


def show(value: Json) -> str:
    """Return a value as it stands in the row, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse_unknown(row: Mapping[str, Json], known: frozenset[str], where: str = "") -> None:
    """Raise BadRowError naming the first field of ``row`` that is not ``known``."""
    for name in row:
        if name not in known:
            raise BadRowError(f"unknown field {where}{name}")


def text_field(row: Mapping[str, Json], name: str, where: str = "") -> str:
    """Return a field that must be a non-empty string."""
    value = row[name]
    if not isinstance(value, str):
        raise BadRowError(f"{where}{name} must be a string, not {show(value)}")
    if not value:
        raise BadRowError(f"{where}{name} is empty")
    return value


def known_adapter(name: str, adapters: Collection[str], others: str = "") -> None:
    """Raise BadRowError unless ``name`` is one of ``adapters``; ``others`` says what else it could have been."""
    if name in adapters:
        return
    if not adapters:
        raise BadRowError(f"unknown adapter {show(name)}: this run has no adapters")
    known = ", ".join(sorted(adapters)[:5]) + (", ..." if len(adapters) > 5 else "")
    raise BadRowError(f"unknown adapter {show(name)}: this run has {known}{others}")


def override(defaults: SamplingParams, values: Mapping[str, Json], where: str = "") -> SamplingParams:
    """Return ``defaults`` with a row's own ``values``; BadRowError says what is wrong with one."""
    if "stop" in values:
        stop = values["stop"]
        if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(s, str) for s in stop)):
            raise BadRowError(f"{where}stop must be a string or a list of strings, not {show(stop)}")
    try:
        return dataclasses.replace(defaults, **values)
    except UsageError as error:
        raise BadRowError(f"{where}{error}") from None


def prompt_field(value: Json, where: str = "", name: str = "prompt") -> str | tuple[int, ...]:
    """Return a prompt (or another field ``name``): non-empty text, or non-empty token ids as a tuple."""
    if isinstance(value, str):
        if not value:
            raise BadRowError(f"{where}{name} is empty")
        return value
    if not isinstance(value, list):
        raise BadRowError(f"{where}{name} must be a string or a list of token ids, not {show(value)}")
    if not value:
        raise BadRowError(f"{where}{name} is empty")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
            raise BadRowError(f"{where}{name} holds {show(token)}, which is not a token id")
    return tuple(value)


def messages_field(value: Json, where: str = "") -> tuple[Mapping[str, Json], ...]:
    """Return a chat's messages, each with ``role`` and a text ``content``.

    A list of text parts becomes one text; other fields of a message go to the chat
    template as they are.
    """
    if not isinstance(value, list):
        raise BadRowError(f"{where}messages must be a list, not {show(value)}")
    if not value:
        raise BadRowError(f"{where}messages is empty")
    return tuple(_message(message, f"{where}messages[{place}]") for place, message in enumerate(value))


def _message(message: Json, where: str) -> Mapping[str, Json]:
    if not isinstance(message, dict):
        raise BadRowError(f"{where} must be an object, not {show(message)}")
    for name in ("role", "content"):
        if name not in message:
            raise BadRowError(f"{where} has no {name}")
    text_field(message, "role", f"{where}.")
    content = message["content"]
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise BadRowError(f"{where}.content must be a string or a list of text parts, not {show(content)}")
    return {**message, "content": "".join(_part(part, f"{where}.content[{n}]") for n, part in enumerate(content))}


def _part(part: Json, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise BadRowError(f'{where} must be {{"type": "text", "text": ...}}, not {show(part)}: only text is supported')
    text: str = part["text"]
    return text
