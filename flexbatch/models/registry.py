"""Which module holds the wiring of which family.

Knows module names only; each is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from flexbatch.models.spec import Family
from flexbatch.shapes import ModelShape

_MODULES = {name: f"flexbatch.models.{name}" for name in ("opt", "gpt2", "llama", "mistral", "qwen2", "qwen3")}


def family_of(shape: ModelShape) -> Family:
    """Return the wiring of a model (``shape.family`` was checked when its configuration was read)."""
    return cast(Family, import_module(_MODULES[shape.family]).FAMILY)
