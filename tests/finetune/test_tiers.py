"""Gradients do not depend on where things rest, in which order backward goes, or how examples are grouped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.errors import DoesNotFitError, UsageError
from flexbatch.finetune import work
from flexbatch.finetune.meter import ActivationMeter
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trainer import Trainer
from flexbatch.options import EngineOptions
from flexbatch.scheduler.training import Order
from tests.finetune.oracle import filled, ragged
from tests.finetune.test_gradients import engine_options, train
from tests.tiny import tiny_checkpoint

PLACES: dict[str, dict[str, Any]] = {
    "weights on disk": {"weights": "0,0,100"},
    "half on disk": {"weights": "0,50,50"},
    "inputs on disk": {"hidden": "0,0,100"},
    "all on disk, one by one": {"weights": "0,0,100", "hidden": "0,50,50", "overlap": False},
    "sim": {"device": "sim"},
    "sim, weights below": {"device": "sim", "weights": "30,30,40", "hidden": "30,30,40"},
    "sim, all on disk": {"device": "sim", "weights": "0,0,100", "hidden": "0,0,100"},
    "sim, all in RAM": {"device": "sim", "weights": "0,100,0", "hidden": "0,100,0", "overlap": False},
    "riding": {"order": "riding"},
    "riding, all on disk": {"order": "riding", "weights": "0,0,100", "hidden": "0,0,100"},
    "riding, sim": {"order": "riding", "device": "sim", "weights": "20,40,40", "hidden": "0,50,50"},
}


@pytest.mark.parametrize(
    ("family", "variant", "dtype"),
    [("llama", "plain", torch.float32), ("opt", "350m", torch.float16), ("gpt2", "plain", torch.bfloat16)],
)
def test_gradients_are_the_same_wherever_things_rest(
    family: str, variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tiny_checkpoint(tmp_path, family, variant, dtype=dtype, shards=2)
    shape = locate(str(path)).shape
    parameters = filled(shape, rank=4, alpha=8, targets="all-linear", seed=5)
    rows = ragged(8, shape.vocab_size, (20, 9, 1, 31, 14, 3, 3, 12))
    loss, expected = train(path, parameters, rows, 0.1, 16)
    assert all(float(gradient.norm()) > 0 for gradient in expected)
    for title, options in PLACES.items():
        print(title)
        again, gradients = train(path, parameters, rows, 0.1, 16, **options)
        if "weights" in options or "device" in options:  # products of other shapes: their sums may round otherwise
            assert again.total == pytest.approx(loss.total, rel=1e-6), title
            far = [float((one - two).norm() / one.norm()) for one, two in zip(expected, gradients, strict=True)]
            assert max(far) < 5e-6, title
        else:
            assert again == loss, title
            assert all(torch.equal(one, two) for one, two in zip(expected, gradients, strict=True)), title


def test_several_passes_add_up(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3")
    folder = locate(str(path))
    parameters = filled(folder.shape, rank=4, alpha=8, targets="all-linear", seed=5)
    rows = ragged(2, folder.shape.vocab_size, (20, 9, 31, 14))
    for order in ("reverse", "riding"):
        loss, expected = train(path, parameters, rows, 0.2, 16, weights="0,0,100", order=order)
        parameters.zero()
        with Trainer(folder, parameters, engine_options(weights="0,0,100"), window=16, order=order) as trainer:
            before = trainer.evaluate(rows)
            parts = [trainer.accumulate([row], 0.2) for row in rows]
            after = trainer.evaluate(rows)
        assert before == after
        assert before.total == pytest.approx(sum(part.total for part in parts), rel=1e-6)
        assert before.tokens == loss.tokens
        for name, gradient in zip(parameters.names(), expected, strict=True):
            assert torch.allclose(parameters.gradient(name), gradient, rtol=1e-4, atol=1e-6)


def test_the_turn_reads_no_weights_twice(tmp_path: Path) -> None:
    """With S slots, S groups are still there when the sweep turns round, and when the next pass begins."""
    path = tiny_checkpoint(tmp_path, "llama")
    folder = locate(str(path))
    parameters = filled(folder.shape, rank=4, alpha=8, targets="all-linear", seed=5)
    rows = ragged(2, folder.shape.vocab_size, (20, 9))
    with Trainer(folder, parameters, engine_options(weights="0,0,100"), window=16) as trainer:
        trainer.accumulate(rows, 1.0)
        once = trainer.stats()["moved_bytes"]["disk_read"]
        trainer.accumulate(rows, 1.0)
        twice = trainer.stats()["moved_bytes"]["disk_read"]
    layers = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert once < 2 * layers
    assert twice - once < 2 * layers


def test_nothing_to_train_on(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama")
    folder = locate(str(path))
    parameters = filled(folder.shape, rank=4, alpha=8, targets="all-linear", seed=5)
    rows = ragged(2, folder.shape.vocab_size, (1, 1))
    with Trainer(folder, parameters, engine_options(), window=16) as trainer:
        assert trainer.accumulate(rows, 1.0).tokens == 0
        assert trainer.accumulate([], 1.0).tokens == 0
    assert all(float(parameters.gradient(name).norm()) == 0 for name in parameters.names())


def test_what_does_not_fit_is_refused_with_the_tier(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama")
    folder = locate(str(path))
    parameters = filled(folder.shape, rank=4, alpha=8, targets="all-linear", seed=5)
    with pytest.raises(DoesNotFitError, match="cpu tier needs") as caught:
        Trainer(folder, parameters, EngineOptions(device="cpu", cpu_memory=50_000), window=16)
    assert caught.value.tier == "cpu"
    assert caught.value.missing > 0


def test_a_module_that_the_model_has_not(tmp_path: Path) -> None:
    shape = locate(str(tiny_checkpoint(tmp_path, "llama"))).shape
    with pytest.raises(UsageError, match=r"no linear module 'c_attn'.*q_proj"):
        Parameters.create(shape, rank=2, alpha=2, target_modules=["q_proj", "c_attn"], seed=0)


@pytest.mark.parametrize("order", ["reverse", "riding"])
def test_a_step_is_metered_once(order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted for the largest micro-batch of a kind only; the peak is what counting all would find."""
    folder = locate(str(tiny_checkpoint(tmp_path, "llama")))
    parameters = filled(folder.shape, rank=4, alpha=8, targets="all-linear", seed=5)
    rows = ragged(3, folder.shape.vocab_size, (31, 20, 9, 31, 14, 30))
    entered: list[ActivationMeter] = []

    class Counted(ActivationMeter):
        def __enter__(self) -> Any:
            entered.append(self)
            return super().__enter__()  # type: ignore[no-untyped-call]

    monkeypatch.setattr(work, "ActivationMeter", Counted)
    with Trainer(folder, parameters, engine_options(), window=16, order=order) as trainer:
        entered.clear()
        trainer.evaluate(rows)
        assert not entered  # without gradients it takes less
        trainer.accumulate(rows[:1], 0.1)
        one, kinds = trainer.peak_activation_bytes, len(entered)
        assert kinds == 2 * folder.shape.num_layers + 2  # embedding and loss; layers forward and back
        trainer.accumulate(rows, 0.1)
        several = trainer.peak_activation_bytes
        trainer.accumulate(rows, 0.1)
        assert len(entered) == kinds
        assert several == trainer.peak_activation_bytes
        trainer.work._inner.clear()  # all is metered again: what was left out made no difference
        trainer.accumulate(rows, 0.1)
        assert len(entered) > kinds
        assert several == trainer.peak_activation_bytes
    assert one > max(each.peak for each in entered[:kinds])  # buffers count, too
    assert several >= one
