"""Gradients of a base model in bf16: as near to those in float64 as PEFT's are, whose factors work in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from flexbatch.checkpoint.locate import locate
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trainer import Trainer
from flexbatch.options import EngineOptions
from tests.finetune.oracle import filled, peft_model, ragged, reference
from tests.tiny import load_oracle, tiny_checkpoint

LENGTHS = (40, 1, 25, 300, 12)
FACTOR = 1.3


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all gradients together: the norm of the difference over the norm."""
    pairs = [(found[name].double(), wide) for name, wide in expected.items()]
    off = sum(float((one - two).square().sum()) for one, two in pairs)
    norm = sum(float(two.square().sum()) for _, two in pairs)
    return float((off / norm) ** 0.5)


def rounded(path: Path) -> Any:
    """The oracle's base model with its weights rounded to bf16; rotary frequencies are none."""
    model = load_oracle(path)
    for tensor in model.parameters():
        tensor.data = tensor.data.bfloat16()
    return model


@pytest.mark.parametrize(("family", "variant"), [("llama", "plain"), ("opt", "plain"), ("qwen3", "plain")])
@pytest.mark.parametrize("window", [64, 512])
def test_bf16_is_as_near_as_peft(family: str, variant: str, window: int, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, family, variant)
    shape = locate(str(path)).shape
    rows = ragged(5, shape.vocab_size, [min(length, shape.max_positions) for length in LENGTHS])
    scale = 1 / 37
    parameters = filled(shape, rank=4, alpha=8, targets="all-linear", seed=1)
    chosen: dict[str, Any] = {"rank": 4, "alpha": 8, "targets": "all-linear"}
    exact = peft_model(path, parameters, **chosen, base=rounded(path))
    total, count, expected = reference(exact, rows, scale)

    narrow = peft_model(path, parameters, **chosen, base=rounded(path)).float()
    for name, tensor in narrow.named_parameters():
        tensor.data = tensor.data.float() if ".lora_" in name else tensor.data.bfloat16()
    _, _, theirs = reference(narrow, rows, scale)

    parameters.zero()
    options = EngineOptions(device="cpu", dtype="bfloat16")
    longest = max(len(row.tokens) for row in rows)
    with Trainer(
        locate(str(path)), parameters, options, window=window, tokens=sum(LENGTHS), longest=longest
    ) as trainer:
        loss = trainer.accumulate(rows, scale)
    assert loss.tokens == count
    assert loss.total == pytest.approx(total, rel=0.02)
    ours = distance(gradients_of(parameters), expected)
    assert 0 < ours <= FACTOR * distance(theirs, expected)


def gradients_of(parameters: Parameters) -> dict[str, Tensor]:
    """Every gradient by its name."""
    return {name: parameters.gradient(name).cpu() for name in parameters.names()}
