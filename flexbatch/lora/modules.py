"""The linear modules of a base model by the names that adapters know them by, and which of them an adapter is for.

Follows PEFT's rules for names; knows no files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flexbatch.lora.config import AdapterConfig
from flexbatch.models.spec import WeightTable

ALL_LINEAR = "all-linear"
_DEFAULT_TARGETS = {"gpt2": frozenset({"c_attn"})}
_USUAL_TARGETS = frozenset({"q_proj", "v_proj"})


@dataclass(frozen=True, slots=True)
class Module:
    """One linear module: part ``part`` of linear ``linear`` of group ``group``, whose outputs begin at ``column``."""

    name: str
    group: int
    linear: str
    part: int
    in_features: int
    out_features: int
    column: int


def modules_of(table: WeightTable) -> dict[str, Module]:
    """Every linear module of a model by its full name in transformers' causal language model."""
    modules: dict[str, Module] = {}
    for index, group in enumerate(table.groups):
        for linear in group.linears:
            column = 0
            for place, part in enumerate(linear.parts):
                name = group.prefix + part.module
                modules[name] = Module(name, index, linear.name, place, linear.in_features, part.out_features, column)
                column += part.out_features
    return modules


def is_target(config: AdapterConfig, name: str, family: str) -> bool:
    """Whether an adapter with these settings has factors for the module ``name`` of a model of ``family``."""
    if isinstance(config.excluded, str):
        if re.fullmatch(config.excluded, name):
            return False
    elif _named(name, config.excluded):
        return False
    targets = config.targets
    if targets is None:
        targets = _DEFAULT_TARGETS.get(family, _USUAL_TARGETS)
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return name != "lm_head"
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return _named(name, targets) and (config.layers is None or _layer(config, name) in config.layers)


def _named(name: str, names: frozenset[str]) -> bool:
    return name in names or any(name.endswith(f".{short}") for short in names)


def _layer(config: AdapterConfig, name: str) -> int | None:
    """The number of the layer that ``name`` belongs to."""
    patterns = [rf"(?:^|.*?\.){pattern}\." for pattern in config.layers_pattern] or [r".*?\.[^.]*\."]
    for pattern in patterns:
        match = re.match(rf"{pattern}(?P<layer>\d+)\.", name)
        if match is not None:
            return int(match["layer"])
    return None
