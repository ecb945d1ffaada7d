"""What ``adapter_config.json`` says, typed: ranks, scales, modules. A field that asks for more is refused by name.

Knows PEFT's field names; no tensors and no model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from flexbatch.errors import AdapterError

_T = TypeVar("_T")
_NEUTRAL_INITS = (True, False, "gaussian", "orthogonal")  # all others change the base model's weights, or may
_FREE = frozenset(  # they say nothing about results, or are read below
    {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core"}
    | {"peft_version", "qalora_group_size", "revision", "runtime_config"}
    | {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
    | {"layers_to_transform", "layers_pattern", "peft_type", "task_type", "init_lora_weights", "bias"}
)
_REASONS = {
    "use_dora": "DoRA also learns magnitudes",
    "modules_to_save": "it replaces whole modules of the base model",
    "lora_bias": "it adds biases",
    "trainable_token_indices": "it replaces token embeddings",
    "alora_invocation_tokens": "activated LoRA begins at a token",
    "megatron_config": "it is for Megatron's layers",
    "layer_replication": "it adds layers to the base model",
    "target_parameters": "it changes parameters that belong to no linear layer",
    "loftq_config": "it was trained over quantized base weights",
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A LoRA adapter's settings. Hashable, so that thousands of adapters with the same ones share what follows.

    ``targets`` and ``excluded``: a regular expression, names, or (targets) None: what PEFT defaults to. ``layers``
    are those that ``targets`` is limited to (None: all). Patterns are in the file's order: the first match counts.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    targets: str | frozenset[str] | None
    excluded: str | frozenset[str]
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]

    def rank_of(self, module: str) -> int:
        """The rank at a module, by its full name."""
        return _matched(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of both factors is multiplied by: alpha / r, or alpha / sqrt(r) where stabilized."""
        rank = self.rank_of(module)
        return _matched(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def parse_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """Return the settings; raise AdapterError naming the first field that is wrong or not supported."""
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type {raw.get('peft_type')!r} is not supported: only LORA is")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(f"task_type {raw['task_type']!r} is not supported: only CAUSAL_LM is")
    if raw.get("bias", "none") != "none":
        raise AdapterError(f"bias {raw['bias']!r} is not supported: only none is")
    init = raw.get("init_lora_weights", True)
    if init is not None and init not in _NEUTRAL_INITS:
        raise AdapterError(
            f"init_lora_weights {init!r} is not supported: it changes the base model; convert the adapter to plain LoRA"
        )
    for name, value in raw.items():
        # What a field that we do not know does when it is empty is nothing.
        if name not in _FREE and value not in (None, False, {}, [], ""):
            reason = _REASONS.get(name)
            raise AdapterError(f"{name} is not supported" + (f": {reason}" if reason else f" (it is {_short(value)})"))
    targets = _names(raw, "target_modules")
    layers = _layers(raw)
    patterns = raw.get("layers_pattern") or []
    if not isinstance(patterns, str | list):
        raise AdapterError(f"layers_pattern must be a pattern or a list of them, not {_short(patterns)}")
    layers_pattern = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if isinstance(targets, str) and (layers is not None or layers_pattern):
        raise AdapterError("layers_to_transform and layers_pattern cannot go with a target_modules that is a pattern")
    for pattern in layers_pattern:
        _check_pattern("layers_pattern", pattern)
    return AdapterConfig(
        rank=_rank("r", raw.get("r", 8)),
        alpha=_number("lora_alpha", raw.get("lora_alpha", 8)),
        rank_stabilized=_flag(raw, "use_rslora"),
        targets=targets,
        excluded=_names(raw, "exclude_modules") or frozenset(),
        layers=layers,
        layers_pattern=layers_pattern,
        rank_pattern=tuple((key, _rank("rank_pattern", value)) for key, value in _pattern(raw, "rank_pattern")),
        alpha_pattern=tuple((key, _number("alpha_pattern", value)) for key, value in _pattern(raw, "alpha_pattern")),
    )


def _matched(pattern: tuple[tuple[str, _T], ...], module: str, default: _T) -> _T:
    return next((value for key, value in pattern if re.match(rf"(.*\.)?({key})$", module)), default)


def _names(raw: Mapping[str, Any], field: str) -> str | frozenset[str] | None:
    value = raw.get(field)
    if value is None:
        return None
    if isinstance(value, str):
        _check_pattern(field, value)
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    raise AdapterError(f"{field} must be a pattern or a list of names, not {_short(value)}")


def _layers(raw: Mapping[str, Any]) -> frozenset[int] | None:
    value = raw.get("layers_to_transform")
    if value is None or value == []:
        return None
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in values):
        raise AdapterError(f"layers_to_transform must be layer numbers, not {_short(value)}")
    return frozenset(values)


def _pattern(raw: Mapping[str, Any], field: str) -> list[tuple[str, Any]]:
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{field} must be an object, not {_short(value)}")
    for key in value:
        _check_pattern(field, key)
    return list(value.items())


def _check_pattern(field: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError, RecursionError) as error:
        raise AdapterError(f"{field} {_short(pattern)} is no regular expression ({error})") from None


def _rank(field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{field} must be a whole number from 1 on, not {_short(value)}")
    return value


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{field} must be a number, not {_short(value)}")
    return float(value)


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field) or False
    if not isinstance(value, bool):
        raise AdapterError(f"{field} must be true or false, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
