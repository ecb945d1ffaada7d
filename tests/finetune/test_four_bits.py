"""Gradients with the base's weights in 4 bits, against PEFT on the dequantized weights in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.cli.main import main
from tests.checkpoint.grouped_files import write_folder
from tests.finetune.oracle import assert_close, filled, peft_model, ragged, reference
from tests.finetune.test_gradients import train
from tests.quantized_oracle import quantized_oracle
from tests.tiny import FAMILIES, tiny_checkpoint

PLACES: dict[str, dict[str, Any]] = {
    "in RAM": {},
    "on disk": {"weights": "0,0,100", "hidden": "0,0,100"},
    "sim in three": {"device": "sim", "weights": "30,30,40", "hidden": "30,30,40"},
    "riding, half on disk": {"order": "riding", "weights": "0,50,50"},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_peft_on_the_dequantized_weights(family: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m", family, dtype=torch.float16)
    shape = locate(str(path)).shape
    rows = ragged(4, shape.vocab_size, (13, 1, 5, 19, 2))
    parameters = filled(shape, rank=3, alpha=5, targets="all-linear", seed=1)
    plain = peft_model(path, parameters, rank=3, alpha=5, targets="all-linear")
    model = peft_model(path, parameters, rank=3, alpha=5, targets="all-linear", base=quantized_oracle(path))
    total, count, expected = reference(model, rows, 1 / 37)
    other, _, _ = reference(plain, rows, 1 / 37)
    assert abs(other - total) > 1e-4 * total
    for title, options in PLACES.items():
        print(title)
        loss, _ = train(path, parameters, rows, 1 / 37, 7, weight_bits=4, **options)
        assert loss.tokens == count
        assert loss.total == pytest.approx(total, rel=1e-6)
        assert_close(parameters, expected)


def test_a_converted_base_gives_the_same_gradients(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m", "qwen3", dtype=torch.float16)
    assert main(["convert", "--model", str(path), "--output", str(tmp_path / "packed"), "--weight-bits", "4"]) == 0
    shape = locate(str(path)).shape
    rows = ragged(4, shape.vocab_size, (13, 5, 19))
    parameters = filled(shape, rank=3, alpha=5, targets="all-linear", seed=1)
    loss, expected = train(path, parameters, rows, 1.0, 7, weight_bits=4, weights="0,0,100")
    again, gradients = train(tmp_path / "packed", parameters, rows, 1.0, 7, weights="0,0,100")
    assert again == loss
    assert all(torch.equal(one, two) for one, two in zip(expected, gradients, strict=True))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_base_that_is_stored_in_four_bits(method: str, tmp_path: Path) -> None:
    """To the rounding of each weight to fp16, which the oracle's have and products in fp32 do without."""
    base = write_folder(tmp_path, "llama", method, 32)
    shape = locate(str(tmp_path)).shape
    rows = ragged(4, shape.vocab_size, (13, 5, 19))
    parameters = filled(shape, rank=3, alpha=5, targets="all-linear", seed=1)
    model = peft_model(tmp_path, parameters, rank=3, alpha=5, targets="all-linear", base=base)
    total, _, expected = reference(model, rows, 1.0)
    for weights in ("0,100,0", "0,0,100"):
        loss, _ = train(tmp_path, parameters, rows, 1.0, 7, weights=weights)
        assert loss.total == pytest.approx(total, rel=1e-4)
        assert_close(parameters, expected, bound=5e-3)
