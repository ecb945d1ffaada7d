"""Adapters made by PEFT for tiny models, and PEFT running each row alone, as the oracle."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from flexbatch.requests import TokenizedRequest
from tests.oracle import Row, generate_row, requests_of
from tests.tiny import load_oracle

ATTENTION = {"gpt2": ["c_attn"]}
MLP = {"gpt2": ["c_fc", "mlp.c_proj"], "opt": ["fc1", "fc2"]}
LAYERS = {"gpt2": "h"}


def configs(family: str, rng: random.Random) -> dict[str, dict[str, Any]]:
    """Twelve ways to be an adapter: ranks from 1 to 128, every way to name modules, patterns, scales."""
    attention = ATTENTION.get(family, ["q_proj", "v_proj"])
    mlp = MLP.get(family, ["gate_proj", "down_proj"])
    layer = LAYERS.get(family, "layers")
    some = [*attention, *mlp]
    return {
        "usual": {"r": 8, "lora_alpha": 16, "target_modules": attention},
        "all": {"r": 5, "lora_alpha": 7, "target_modules": "all-linear"},
        "large": {"r": 128, "lora_alpha": 32, "target_modules": some},
        "one": {"r": 1, "lora_alpha": 1, "target_modules": "all-linear"},
        "stable": {"r": 64, "lora_alpha": 16, "use_rslora": True, "target_modules": attention},
        "mlp": {"r": 3, "lora_alpha": 12, "target_modules": mlp},
        "pattern": {"r": 16, "target_modules": rf".*\.{layer}\.[02]\..*({'|'.join(n.split('.')[-1] for n in some)})"},
        "ranks": {
            "r": 4,
            "lora_alpha": 9,
            "target_modules": some,
            "rank_pattern": {rf".*{layer}\.1\..*": 33, some[-1]: 2},
            "alpha_pattern": {some[0]: 3},
        },
        "layer": {"r": 7, "target_modules": some, "layers_to_transform": [1]},
        "layers": {"r": 6, "target_modules": some, "layers_to_transform": [0, 2], "layers_pattern": layer},
        "excluded": {"r": 24, "target_modules": "all-linear", "exclude_modules": [attention[0]]},
        "random": {
            "r": rng.randint(1, 128),
            "lora_alpha": rng.randint(1, 64),
            "use_rslora": rng.random() < 0.5,
            "target_modules": rng.choice(["all-linear", attention, mlp]),
        },
    }


def make_adapters(model_path: Path, folder: Path, settings: Mapping[str, dict[str, Any]], seed: int) -> dict[str, Path]:
    """Write an adapter with random factors for each of ``settings``, every other one as ``.bin``."""
    generator = torch.Generator().manual_seed(seed)
    base = load_oracle(model_path)
    made: dict[str, Path] = {}
    for number, (name, values) in enumerate(settings.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **values)
            model = get_peft_model(copy.deepcopy(base), config)
            with torch.no_grad():
                for module in cast(Any, model).modules():
                    if hasattr(module, "lora_A") and "default" in module.lora_A:
                        _randomize(module, generator)
            made[name] = folder / name
            model.save_pretrained(str(made[name]), safe_serialization=number % 3 > 0, save_embedding_layers=False)
    return made


def _randomize(module: Any, generator: torch.Generator) -> None:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    rank, scale = a.shape[0], module.scaling["default"]
    a.copy_(torch.randn(a.shape, generator=generator) / math.sqrt(a.shape[1]))
    b.copy_(torch.randn(b.shape, generator=generator) * 0.7 / (math.sqrt(rank) * scale))


def generate_with(
    base: Any, folders: Mapping[str, Path], rows: Sequence[tuple[tuple[int, ...], int]], names: Sequence[str | None]
) -> list[Row]:
    """Every row alone, with PEFT where it names an adapter. ``base``: transformers' model, or its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load_oracle(base) if isinstance(base, Path) else base
        out: list[Row | None] = [
            generate_row(base, *row) if name is None else None for row, name in zip(rows, names, strict=True)
        ]
        model: Any = None
        for name in sorted({name for name in names if name is not None}):
            if model is None:
                model = PeftModel.from_pretrained(base, folders[name], adapter_name=name)
            else:
                model.load_adapter(folders[name], adapter_name=name)
            model.set_adapter(name)
            model.eval()
            for place, row in enumerate(rows):
                if names[place] == name:
                    out[place] = generate_row(model, *row)
    return [row for row in out if row is not None]


def requests_with(rows: Sequence[Row], names: Sequence[str | None], **params: object) -> list[TokenizedRequest]:
    """The rows as requests that name their adapters."""
    return [
        replace(made, request=replace(made.request, lora=name))
        for made, name in zip(requests_of(rows, **params), names, strict=True)
    ]
