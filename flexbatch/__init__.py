"""Offline batch generation on one commodity GPU, or none, with models that do not fit on it.

Importing this package loads neither torch nor transformers; the names below are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexbatch.api import LLM
    from flexbatch.requests import Result
    from flexbatch.sampling import SamplingParams

__all__ = ["LLM", "Result", "SamplingParams", "__version__"]
__version__ = "0.1.0"

_HOMES = {"LLM": "flexbatch.api", "Result": "flexbatch.requests", "SamplingParams": "flexbatch.sampling"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
