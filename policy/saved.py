"""A plan that was saved as JSON, read back as the options that bring it about. Checks every field; chooses nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from flexbatch.errors import UsageError
from flexbatch.options import DType, EngineOptions, Schedule
from flexbatch.units import Shares

_LARGEST = 2**22  # bytes
_LITTLE = 0.005  # of the KV cache
_DTYPES: tuple[DType, ...] = ("auto", "float16", "bfloat16", "float32")
_OPTIONS = ("weights", "kv", "hidden", "cpu_attention", "micro_batch", "max_sequences")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """What a saved plan fixes; ``options`` holds nothing else."""

    model: str
    options: EngineOptions

    def applied(self, options: EngineOptions) -> EngineOptions:
        """``options`` with the plan's placement; UsageError if they say another placement themselves."""
        default = EngineOptions()
        for name in (*_OPTIONS, "weight_bits", "kv_bits", "schedule"):
            if getattr(options, name) != getattr(default, name):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option}: the plan given with --plan says that already: give one of the two")
        own = {name: getattr(self.options, name) for name in (*_OPTIONS, "weight_bits", "kv_bits", "schedule")}
        dtype = self.options.dtype if options.dtype == "auto" else options.dtype
        return replace(options, **own, dtype=dtype)


def load_plan(path: Path) -> SavedPlan:
    """Read what ``flexbatch plan --json`` wrote. Raises UsageError with one line for each mistake in the file."""
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"--plan {path}: larger than any plan: give a file that flexbatch plan --json wrote")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"--plan {path}: cannot be read ({error.strerror}): save one with flexbatch plan --json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--plan {path}: not valid JSON ({error}): save one with flexbatch plan --json") from None
    return parse_plan(value, str(path))


def parse_plan(value: Any, where: str) -> SavedPlan:
    """``load_plan`` of a JSON value; ``where`` names its file. Members that are not known are let be."""
    if not isinstance(value, dict):
        raise UsageError(f"--plan {where}: not a JSON object: save one with flexbatch plan --json")
    reader = _Reader(value)
    default = EngineOptions()
    model = reader.take("model", _text)
    weights, kv, hidden = (reader.take(name, _shares) for name in ("weights", "kv", "hidden"))
    attention = reader.take("cpu_attention", _fraction)
    weight_bits, kv_bits = reader.take("weight_bits", _bits), reader.take("kv_bits", _bits)
    sequences = reader.take("max_sequences", _count)
    schedule: Schedule = reader.take("schedule", _schedule, default.schedule) or default.schedule
    tokens = reader.take("micro_batch_tokens", _count)
    batch = reader.take("micro_batch_sequences", _count) if schedule == "block" else tokens
    dtype: DType = reader.take("dtype", _dtype, default.dtype) or default.dtype
    if reader.mistakes:
        lines = [f"--plan {where}: {mistake}" for mistake in reader.mistakes]
        raise UsageError("\n".join(lines))
    options = EngineOptions(
        weights=weights,
        kv=kv,
        hidden=hidden,
        cpu_attention=None if kv is None or attention is None else _attends(attention, 1 - kv.gpu),
        weight_bits=weight_bits,
        kv_bits=kv_bits,
        micro_batch=batch,
        max_sequences=sequences,
        schedule=schedule,
        dtype=dtype,
    )
    return SavedPlan(model or "", options)


def _attends(attention: float, below: float) -> bool | None:
    """Whether the CPU attends to all KV ``below`` the GPU, to none, or (None) to a part that the policy chooses."""
    if below <= _LITTLE or _LITTLE < attention < below - _LITTLE:
        return None
    return attention > _LITTLE


class _BadFieldError(Exception):
    """What should stand there instead."""


class _Reader:
    def __init__(self, value: dict[str, Any]) -> None:
        self.mistakes: list[str] = []
        self._value = value

    def take(self, name: str, parse: Callable[[Any], Value], default: Value | None = None) -> Value | None:
        """The member ``name``, or ``default``; None, and a mistake, if it is wrong."""
        if name not in self._value:
            if default is None:
                self.mistakes.append(f"{name}: missing: save the plan anew with flexbatch plan --json")
            return default
        try:
            return parse(self._value[name])
        except _BadFieldError as error:
            shown = json.dumps(self._value[name])
            self.mistakes.append(f"{name}: {shown if len(shown) <= 60 else shown[:57] + '...'}: {error}")
            return None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _BadFieldError("write the model's name")
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fraction(value: Any) -> float:
    if not _number(value) or not 0 <= value <= 1:
        raise _BadFieldError("write a fraction from 0 to 1")
    return float(value)


def _shares(value: Any) -> Shares:
    tiers = ("gpu", "cpu", "disk")
    advice = 'write fractions that sum to 1, such as {"gpu": 0.2, "cpu": 0.8, "disk": 0}'
    if not isinstance(value, dict) or set(value) != set(tiers) or not all(_number(value[tier]) for tier in tiers):
        raise _BadFieldError(advice)
    try:
        return Shares(*(float(value[tier]) for tier in tiers))
    except UsageError:
        raise _BadFieldError(advice) from None


def _bits(value: Any) -> Any:
    if value not in (16, 4) or isinstance(value, bool):
        raise _BadFieldError("write 16 or 4")
    return int(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**9:
        raise _BadFieldError("write a whole number from 1 on")
    return value


def _schedule(value: Any) -> Schedule:
    if value == "continuous":
        return "continuous"
    if value == "block":
        return "block"
    raise _BadFieldError("write continuous or block")


def _dtype(value: Any) -> DType:
    for known in _DTYPES:
        if value == known:
            return known
    raise _BadFieldError(f"write one of {', '.join(_DTYPES)}")
