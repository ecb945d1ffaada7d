"""Placements over all three tiers that several tests have in common, as options of an engine."""

from __future__ import annotations

from typing import Any

SIM_IN_THREE: dict[str, Any] = {
    "device": "sim",
    "weights": "30,30,40",
    "kv": "34,33,33",
    "hidden": "34,33,33",
    "micro_batch": 40,
}
IN_THREE: dict[str, dict[str, Any]] = {
    "sim in three": {**SIM_IN_THREE, "cpu_attention": True},
    "sim in three, attention on the GPU": {**SIM_IN_THREE, "cpu_attention": False},
}
