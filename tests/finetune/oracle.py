"""PEFT with autograd in float64 as the oracle of gradients, and examples to train on."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

from flexbatch.finetune.parameters import Parameters
from flexbatch.shapes import ModelShape
from tests.tiny import load_oracle


@dataclass(frozen=True)
class Row:
    """An example of the tests."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]


def ragged(seed: int, vocab: int, lengths: Sequence[int]) -> list[Row]:
    """Examples of these lengths: a prompt that is not trained on, then targets with gaps, as turns of a chat have."""
    rng = random.Random(seed)
    rows = []
    for length in lengths:
        begin = rng.randint(1, max(1, length // 2))
        trained = [at >= begin and rng.random() < 0.8 for at in range(length)]
        trained[0] = False
        rows.append(Row(tuple(rng.randrange(vocab) for _ in range(length)), tuple(trained)))
    return rows


def filled(shape: ModelShape, *, rank: int, alpha: float, targets: str | list[str], seed: int) -> Parameters:
    """An adapter in which no factor is zero."""
    made = Parameters.create(shape, rank=rank, alpha=alpha, target_modules=targets, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in made.items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return made


def peft_model(
    path: Path, parameters: Parameters, *, rank: int, alpha: float, targets: str | list[str], base: Any = None
) -> Any:
    """PEFT's model with the same factors, in float64, on ``base`` (None: the one that ``path`` stores)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(
            base or load_oracle(path),
            LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=int(alpha), target_modules=targets),
        )
    model = model.double()
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False  # the same numbers by operations that know no float64
    named = {
        name.replace(".default.", "."): tensor for name, tensor in model.named_parameters() if tensor.requires_grad
    }
    assert set(named) == set(parameters.names())
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(parameters.parameter(name))
    return model


def reference(model: Any, rows: Sequence[Row], scale: float) -> tuple[float, int, dict[str, Tensor]]:
    """Sum of the targets' losses, their number, and every gradient of ``scale`` times that sum."""
    total, count = 0.0, 0
    model.zero_grad()
    for row in rows:
        logits = model(torch.tensor([row.tokens])).logits[0, :-1]
        targets = torch.tensor([token if on else -100 for token, on in zip(row.tokens, row.trained, strict=True)][1:])
        if not any(row.trained):
            continue
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        (scale * loss).backward()
        total += float(loss.detach())
        count += sum(row.trained)
    gradients = {
        name.replace(".default.", "."): tensor.grad.clone()
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    }
    return total, count, gradients


def assert_close(parameters: Parameters, gradients: dict[str, Tensor], bound: float = 1e-5) -> float:
    """Assert that every gradient is near, norm of the difference over norm; return the largest of these."""
    worst = 0.0
    for name, expected in gradients.items():
        found = parameters.gradient(name).cpu().double()
        assert expected.norm() > 0, name
        distance = float((found - expected).norm() / expected.norm())
        assert distance <= bound, f"{name}: {distance:.2e}"
        worst = max(worst, distance)
    return worst


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
