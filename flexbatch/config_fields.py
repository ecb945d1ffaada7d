"""Typed reading of one ``config.json`` against a table of its fields; every wrong value is one clear line.

Knows nothing of any architecture: which fields there are, and what they mean, is ``config_families``'s part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flexbatch.errors import ModelError

REQUIRED: Final = object()
"""Default of a field that must be given."""

# Far above any model there is, far below what would make sizes overflow or tables exhaust memory.
MAX_WIDTH = 2**20
MAX_LAYERS = 2**12
MAX_VOCAB = 2**24
MAX_POSITIONS = 2**27


@dataclass(frozen=True, slots=True)
class Field:
    """One field that is implemented: how it is checked, what its absence means, and its other names.

    ``check`` returns None when a value is right, else what the value must be. ``null``: JSON null is a value of it.
    """

    check: Callable[[Any], str | None]
    default: Any = REQUIRED
    null: bool = False
    aliases: tuple[str, ...] = ()


def whole(low: int, high: int, default: Any = REQUIRED, *, null: bool = False, aliases: tuple[str, ...] = ()) -> Field:
    """Return a field that holds a whole number from ``low`` to ``high``."""

    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"a whole number from {low} to {high}"

    return Field(check, default, null, aliases)


def number(low: float, high: float, default: Any = REQUIRED) -> Field:
    """Return a field that holds a finite number from ``low`` to ``high``."""
    return Field(lambda value: None if is_number(value, low, high) else f"a number from {low:g} to {high:g}", default)


def flag(default: bool) -> Field:
    """Return a field that holds true or false."""
    return Field(lambda value: None if isinstance(value, bool) else "true or false", default)


def choice(allowed: Sequence[str], default: str) -> Field:
    """Return a field that holds one of some words."""

    def check(value: Any) -> str | None:
        return None if isinstance(value, str) and value in allowed else "one of " + ", ".join(sorted(allowed))

    return Field(check, default)


def words() -> Field:
    """Return an optional field that holds a list of words."""

    def check(value: Any) -> str | None:
        right = isinstance(value, list) and all(isinstance(word, str) for word in value)
        return None if right else "a list of strings"

    return Field(check, None, null=True)


def is_number(value: Any, low: float, high: float) -> bool:
    """Return whether ``value`` is a finite number from ``low`` to ``high`` (booleans are none)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high and math.isfinite(value)


def refuse(architecture: str, field: str, value: Any, reason: str) -> ModelError:
    """Return the error for a value that is wrong or not implemented; long values are cut."""
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return ModelError(f"config.json: {architecture}: {field} is {text}; {reason}")


def read_fields(architecture: str, fields: Mapping[str, Field], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked value of every field of the table; raise ModelError naming the first that is wrong."""
    values = {}
    for name, field in fields.items():
        given = next((key for key in (name, *field.aliases) if key in config), None)
        if given is None:
            if field.default is REQUIRED:
                raise ModelError(f"config.json: {architecture}: the required field {name} is missing")
            values[name] = field.default
            continue
        value = config[given]
        if not (value is None and field.null):
            expected = field.check(value)
            if expected is not None:
                raise refuse(architecture, given, value, f"it must be {expected}")
        values[name] = value
    return values
