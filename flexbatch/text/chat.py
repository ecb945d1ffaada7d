"""The messages of one chat as a template receives them: checked, with text parts joined.

Knows nothing of templates or of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexbatch.errors import InputError


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with string contents; other keys (``name``) are passed on as they are.

    A content given as parts (``[{"type": "text", "text": ...}]``) is joined. Raises InputError, naming the message
    and the field, for anything that is not a list of objects with a string role and a text content.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InputError("messages must be a non-empty list of objects with role and content")
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} must be an object with role and content, not {_kind(message)}")
    for key in ("role", "content"):
        if key not in message:
            raise InputError(f"{where} has no {key}")
    if not isinstance(message["role"], str):
        raise InputError(f"{where}.role must be a string, not {_kind(message['role'])}")
    return {**message, "content": _content(message["content"], f"{where}.content")}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise InputError(f"{where} must be a string or a list of text parts, not {_kind(content)}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind is None:
            raise InputError(f'{where}[{index}] must be an object like {{"type": "text", "text": "..."}}')
        if kind != "text":
            raise InputError(f"{where}[{index}] has type {kind!r}: flexbatch reads text parts only")
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where}[{index}].text must be a string, not {_kind(part.get('text'))}")
        texts.append(part["text"])
    return "".join(texts)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
