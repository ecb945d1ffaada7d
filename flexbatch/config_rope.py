"""Rotary position settings of a ``config.json``, in the names of transformers 4 and of transformers 5.

Knows the names and what may stand in them; the frequencies themselves are ``kernels.rotary``'s part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from flexbatch.config_fields import MAX_POSITIONS, Field, flag, is_number, number, read_fields, refuse, whole
from flexbatch.errors import ModelError
from flexbatch.shapes import Rope

ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
SCALINGS: dict[str, Literal["default", "linear", "llama3", "yarn"]] = {
    "default": "default",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}


def _optional_number(low: float, high: float) -> Field:
    field = number(low, high, None)
    return Field(field.check, None, null=True)


_FACTOR = number(1e-6, 1e6)
_ORIGINAL = whole(1, MAX_POSITIONS, None, null=True)
_FIELDS: dict[str, dict[str, Field]] = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "llama3": {
        "factor": _FACTOR,
        "low_freq_factor": number(1e-6, 1e6),
        "high_freq_factor": number(1e-6, 1e6),
        "original_max_position_embeddings": _ORIGINAL,
    },
    "yarn": {
        "factor": Field(_FACTOR.check, null=True),
        "original_max_position_embeddings": _ORIGINAL,
        "attention_factor": _optional_number(0, 1e6),
        "beta_fast": _optional_number(0, 1e6),
        "beta_slow": _optional_number(0, 1e6),
        "mscale": _optional_number(0, 1e6),
        "mscale_all_dim": _optional_number(0, 1e6),
        "truncate": flag(True),
    },
}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(
    architecture: str, config: Mapping[str, Any], head_dim: int, max_positions: int
) -> tuple[Rope, tuple[str, ...]]:
    """Return the rotary settings and warnings on unknown fields; raise ModelError on what is not implemented."""
    source, given = _settings(architecture, config)
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        reason = "rope scaling of this type is not supported (supported: " + ", ".join(SCALINGS) + ")"
        raise refuse(architecture, f"{source}.rope_type", kind, reason)
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    if not is_number(theta, 1.0 + 1e-9, 1e15):
        raise refuse(architecture, "rope_theta", theta, "it must be a number above 1")
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and partial != 1:
        raise refuse(architecture, "partial_rotary_factor", partial, "only 1 (the whole head) is supported")
    if head_dim % 2:
        raise refuse(architecture, "head_dim", head_dim, "rotary positions need an even head size")
    fields = _FIELDS[kind]
    values = read_fields(f"{architecture}: {source}", fields, given)
    unknown = sorted(key for key in given if key not in fields and key not in _COMMON)
    warnings = tuple(
        f"config.json: {architecture} with {kind} rope does not know {source}.{key}; it is ignored" for key in unknown
    )
    factor = values.get("factor", 1.0)
    original = values.get("original_max_position_embeddings")
    original = max_positions if original is None else original
    if factor is None:  # yarn only: the ratio of the windows
        factor = max_positions / original
    parameters: dict[str, Any] | None = None
    if kind == "llama3":
        low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
        if high <= low:
            raise refuse(architecture, f"{source}.high_freq_factor", high, f"it must be above low_freq_factor ({low})")
        parameters = {
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    elif kind == "yarn":
        fast, slow = float(values["beta_fast"] or 32), float(values["beta_slow"] or 1)
        if fast < slow:
            raise refuse(architecture, f"{source}.beta_fast", fast, f"it must not be below beta_slow ({slow})")
        parameters = {
            "beta_fast": fast,
            "beta_slow": slow,
            "truncate": values["truncate"],
            "attention_factor": _attention_factor(values, factor),
            "original_max_position_embeddings": original,
        }
    return Rope(float(theta), head_dim, SCALINGS[kind], float(factor), parameters), warnings


def _settings(architecture: str, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the field that holds the settings (transformers 4's wins, as in transformers 5) and its content."""
    for source in ("rope_scaling", "rope_parameters"):
        given = config.get(source)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise refuse(architecture, source, given, "it must be an object or null")
        if not given:
            continue
        nested = [key for key, value in given.items() if isinstance(value, dict)]
        if nested:
            raise ModelError(
                f"config.json: {architecture}: {source}.{nested[0]}: rotary settings by layer type are not supported"
            )
        return source, given
    return "rope_parameters", {}


def _attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """Return what yarn multiplies cos and sin by (YaRN, arXiv 2309.00071, section 3.4; DeepSeek's two mscales)."""
    if values["attention_factor"] is not None:
        return float(values["attention_factor"])

    def mscale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values["mscale"] and values["mscale_all_dim"]:
        return mscale(values["mscale"]) / mscale(values["mscale_all_dim"])
    return mscale(1.0)
