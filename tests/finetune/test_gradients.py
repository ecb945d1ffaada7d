"""Every gradient of every family against PEFT and autograd in float64: windows, ragged examples, tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.finetune.gradients import Loss
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trainer import Trainer
from flexbatch.options import EngineOptions
from flexbatch.units import parse_shares
from tests.finetune.oracle import Row, assert_close, filled, peft_model, ragged, reference
from tests.tiny import ALL_VARIANTS, tiny_checkpoint

PARTIAL = {"gpt2": ["c_attn", "mlp.c_proj"], "opt": ["q_proj", "fc1"]}
LENGTHS = (13, 1, 5, 19, 2)


def engine_options(**options: Any) -> EngineOptions:
    for name in ("weights", "hidden"):
        if name in options:
            options[name] = parse_shares(options[name], name)
    return EngineOptions(**{"device": "cpu", **options})


def train(
    path: Path, parameters: Parameters, rows: list[Row], scale: float, window: int, **options: Any
) -> tuple[Loss, list[torch.Tensor]]:
    order = options.pop("order", "reverse")
    parameters.zero()
    with Trainer(
        locate(str(path)), parameters, engine_options(**options), window=window, order=order, tokens=200
    ) as trainer:
        loss = trainer.accumulate(rows, scale)
    return loss, [parameters.gradient(name).cpu().clone() for name in parameters.names()]


@pytest.mark.parametrize(("family", "variant"), ALL_VARIANTS)
def test_gradients_equal_peft(family: str, variant: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, family, variant)
    shape = locate(str(path)).shape
    rows = ragged(3, shape.vocab_size, LENGTHS)
    scale = 1 / 37
    partial: list[str] = PARTIAL.get(family, ["k_proj", "down_proj"])
    for targets in ("all-linear", partial):
        parameters = filled(shape, rank=3, alpha=5, targets=targets, seed=1)
        model = peft_model(path, parameters, rank=3, alpha=5, targets=targets)
        total, count, expected = reference(model, rows, scale)
        for window in (1, 7, 512) if targets == "all-linear" else (7,):
            loss, _ = train(path, parameters, rows, scale, window)
            assert loss.tokens == count
            assert loss.total == pytest.approx(total, rel=1e-6)
            worst = assert_close(parameters, expected, bound=1e-4)
            if worst > 1e-5:  # an ill-conditioned model: then as near as PEFT's own fp32 is, within a factor of two
                _, _, narrow = reference(model.float(), rows, scale)
                model.double()
                pairs = [(narrow[name].double(), wide) for name, wide in expected.items()]
                theirs = max(float((one - two).norm() / two.norm()) for one, two in pairs)
                assert worst <= 2 * theirs, f"{worst:.1e}, PEFT in fp32 {theirs:.1e}"
