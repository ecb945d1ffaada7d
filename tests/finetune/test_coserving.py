"""Training that rides on inference: the same gradients as alone, and the same text as without it."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.errors import FlexbatchError
from flexbatch.finetune.coserving import CoServingTrainer
from flexbatch.finetune.parameters import Parameters
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.policy.workload import Workload
from flexbatch.runtime.engine import Engine
from flexbatch.scheduler.training import Order
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


@dataclass(frozen=True)
class Both:
    """A model, and what each of the two jobs gives alone."""

    path: Path
    calls: list[list[Row]]
    losses: list[float]
    gradients: list[list[torch.Tensor]]
    alone: list[Any]

    def parameters(self) -> Parameters:
        return filled(locate(str(self.path)).shape, rank=4, alpha=8, targets="all-linear", seed=5)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    path = tiny_checkpoint(tmp_path_factory.mktemp("both"), "llama")
    vocab = locate(str(path)).shape.vocab_size
    made = Both(path, [ragged(number, vocab, (20, 9, 1, 31, 14, 12)) for number in range(3)], [], [], [])
    for rows in made.calls:
        parameters = made.parameters()
        loss, gradients = train(path, parameters, rows, 0.1, 16)
        made.losses.append(loss.total)
        made.gradients.append(gradients)
    prompts = ragged_rows(random.Random(4), vocab, 16, longest=30, new=12)
    made.alone.extend(generate_alone(path, prompts))
    return made


@pytest.mark.parametrize("title", PLACES)
@pytest.mark.parametrize(
    ("order", "kept", "inference"),
    [("riding", None, 16), ("riding", "disk", 16), ("reverse", None, 16), (None, None, 2)],
)
def test_gradients_and_text_are_those_of_each_alone(
    title: str, order: Order | None, kept: str | None, inference: int, both: Both
) -> None:
    folder = locate(str(both.path))
    parameters, alone = both.parameters(), both.alone[:inference]
    requests = requests_of(alone)
    options = engine_options(**PLACES[title], max_sequences=4)
    trainer = CoServingTrainer(
        parameters, options, size_of(both.path), window=16, tokens=100, longest=31, share=0.9, kept=kept, order=order
    )
    found: list[tuple[float, list[torch.Tensor]]] = []
    rode: list[int] = []

    def job() -> None:
        for rows in both.calls:
            parameters.zero()
            loss = trainer.accumulate(rows, 0.1, [4, 2])
            found.append((loss.total, [parameters.gradient(name).cpu().clone() for name in parameters.names()]))
            rode.append(trainer.ridden + trainer.pauses)
        trainer.close()

    thread = threading.Thread(target=job)
    with Engine(folder, None, options, Workload.of(requests), passenger=trainer) as engine:
        thread.start()
        # Otherwise inference may be over before training asks for something.
        while trainer._asked.empty() and thread.is_alive():
            time.sleep(0.001)
        results = list(engine.run(requests))
        trainer.drive()
        thread.join()
    assert_equal(results, alone)
    assert rode[0] > 0 or order is None, "nothing rode on inference"
    assert order is None or (trainer.ridden > 0) == (order == "riding")
    for (loss, gradients), total, wanted in zip(found, both.losses, both.gradients, strict=True):
        assert loss == pytest.approx(total, rel=1e-6)
        for one, two in zip(gradients, wanted, strict=True):
            assert float((one - two).norm() / two.norm()) < 1e-5


def test_a_failure_of_inference_ends_training(both: Both) -> None:
    path = both.path
    folder = locate(str(path))
    parameters = both.parameters()
    rows: list[Row] = ragged(1, folder.shape.vocab_size, (20, 9, 31))
    options = engine_options(max_sequences=5)
    trainer = CoServingTrainer(parameters, options, size_of(path), window=16, tokens=100, share=0.5)
    errors: list[str] = []

    def job() -> None:
        try:
            for _ in range(100):
                trainer.accumulate(rows, 1.0)
        except FlexbatchError as error:
            errors.append(str(error))

    requests = requests_of(both.alone)
    thread = threading.Thread(target=job)
    with Engine(folder, None, options, Workload.of(requests), passenger=trainer) as engine:
        thread.start()
        running = engine.run(requests)
        next(running)
        with pytest.raises(KeyError):
            running.throw(KeyError("broken"))  # type: ignore[attr-defined]
        thread.join(20)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert "inference ended, and training with it" in errors[0]
