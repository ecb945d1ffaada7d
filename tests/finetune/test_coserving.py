"""Training that rides on inference: the same gradients as alone, and the same text as without it."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.errors import FlexbatchError
from flexbatch.finetune.coserving import RidingTrainer
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.policy.workload import Workload
from flexbatch.runtime.engine import Engine
from tests.finetune.oracle import Row, filled, ragged
from tests.finetune.test_gradients import engine_options, train
from tests.oracle import assert_equal, generate_alone, ragged_rows, requests_of
from tests.tiny import tiny_checkpoint

PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "disk": {"weights": "0,0,100"},
    "sim": {"device": "sim", "weights": "30,30,40"},
}


def size_of(path: Path) -> Any:
    shape = locate(str(path)).shape
    return model_size(shape, family_of(shape).table(shape))


@pytest.mark.parametrize("title", PLACES)
@pytest.mark.parametrize("kept", [None, "disk"])
def test_gradients_and_text_are_those_of_each_alone(title: str, kept: str | None, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama")
    folder = locate(str(path))
    parameters = filled(folder.shape, rank=4, alpha=8, targets="all-linear", seed=5)
    calls = [ragged(number, folder.shape.vocab_size, (20, 9, 1, 31, 14, 12)) for number in range(5)]
    expected = [train(path, parameters, rows, 0.1, 16) for rows in calls]
    prompts = ragged_rows(random.Random(4), folder.shape.vocab_size, 24, longest=30, new=12)
    alone = generate_alone(path, prompts)
    requests = requests_of(alone)
    options = engine_options(**PLACES[title], max_sequences=5)
    trainer = RidingTrainer(parameters, options, size_of(path), window=16, tokens=100, longest=31, share=0.9, kept=kept)
    found: list[tuple[float, list[torch.Tensor]]] = []
    rode: list[int] = []

    def job() -> None:
        for rows in calls:
            parameters.zero()
            loss = trainer.accumulate(rows, 0.1)
            found.append((loss.total, [parameters.gradient(name).cpu().clone() for name in parameters.names()]))
            rode.append(trainer.ridden)

    thread = threading.Thread(target=job)
    with Engine(folder, None, options, Workload.of(requests), passenger=trainer) as engine:
        thread.start()
        results = list(engine.run(requests))
        thread.join()
        trainer.close()
    assert_equal(results, alone)
    assert rode[0] > 0, "nothing rode on inference"
    for (loss, gradients), (total, wanted) in zip(found, expected, strict=True):
        assert loss == pytest.approx(total.total, rel=1e-6)
        for one, two in zip(gradients, wanted, strict=True):
            assert float((one - two).norm() / two.norm()) < 1e-5


def test_a_failure_of_inference_ends_training(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama")
    folder = locate(str(path))
    parameters = filled(folder.shape, rank=4, alpha=8, targets="all-linear", seed=5)
    rows: list[Row] = ragged(1, folder.shape.vocab_size, (20, 9, 31))
    options = engine_options(max_sequences=5)
    trainer = RidingTrainer(parameters, options, size_of(path), window=16, tokens=100, share=0.5)
    errors: list[str] = []

    def job() -> None:
        try:
            for _ in range(100):
                trainer.accumulate(rows, 1.0)
        except FlexbatchError as error:
            errors.append(str(error))

    prompts = ragged_rows(random.Random(4), folder.shape.vocab_size, 12, longest=30, new=12)
    requests = requests_of(generate_alone(path, prompts))
    thread = threading.Thread(target=job)
    with Engine(folder, None, options, Workload.of(requests), passenger=trainer) as engine:
        thread.start()
        running = engine.run(requests)
        next(running)
        with pytest.raises(KeyError):
            running.throw(KeyError("broken"))  # type: ignore[attr-defined]
        thread.join(20)
        trainer.close()
    assert not thread.is_alive()
    assert len(errors) == 1
    assert "inference ended, and training with it" in errors[0]
