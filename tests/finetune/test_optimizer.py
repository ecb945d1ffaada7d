"""AdamW and SGD against torch's own, bit by bit; moments in memory and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.errors import InternalError
from flexbatch.finetune.optimizer import AdamW, FileMoments, MemoryMoments, Optimizer, Sgd, clip_gradients
from tests.finetune.fakes import FakeParameters

SHAPES = {"a": (3, 70), "b": (41, 3), "c": (1, 1), "d": (2000, 5)}


def filled(seed: int) -> FakeParameters:
    generator = torch.Generator().manual_seed(seed)
    return FakeParameters({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})


def draw(parameters: FakeParameters, generator: torch.Generator, scale: float) -> None:
    for name in parameters.names():
        gradient = parameters.gradient(name)
        gradient.copy_(torch.randn(gradient.shape, generator=generator) * scale)


@pytest.mark.parametrize("kind", ["adamw memory", "adamw file", "sgd"])
@pytest.mark.parametrize(("decay", "clip"), [(0.0, 0.0), (0.1, 1.0), (0.03, 1e9)])
def test_steps_are_those_of_torch(kind: str, decay: float, clip: float, tmp_path: Path) -> None:
    parameters = filled(1)
    oracles = [torch.nn.Parameter(parameters.parameter(name).clone()) for name in parameters.names()]
    oracle: torch.optim.Optimizer
    optimizer: Optimizer
    if kind == "sgd":
        oracle, optimizer = torch.optim.SGD(oracles, lr=1.0, weight_decay=decay), Sgd(parameters, weight_decay=decay)
    else:
        oracle = torch.optim.AdamW(oracles, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
        moments = MemoryMoments(parameters) if kind == "adamw memory" else FileMoments(parameters, tmp_path)
        optimizer = AdamW(parameters, moments, weight_decay=decay)
    generator = torch.Generator().manual_seed(2)
    for step in range(40):
        rate = 1e-2 * (40 - step) / 40
        draw(parameters, generator, 10.0 ** (step % 5 - 3))
        for name, tensor in zip(parameters.names(), oracles, strict=True):
            tensor.grad = parameters.gradient(name).clone()
        norm = clip_gradients(parameters, clip)
        if clip:
            assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(oracles, clip).item(), rel=1e-6)
        oracle.param_groups[0]["lr"] = rate
        oracle.step()
        optimizer.step(rate)
        for name, tensor in zip(parameters.names(), oracles, strict=True):
            assert torch.equal(parameters.parameter(name), tensor.detach()), (step, name)
    optimizer.close()


@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_restored_state_goes_on_the_same(place: str, tmp_path: Path) -> None:
    def made(parameters: FakeParameters) -> AdamW:
        return AdamW(parameters, MemoryMoments(parameters) if place == "memory" else FileMoments(parameters, tmp_path))

    straight = filled(3)
    optimizer = made(straight)
    generator = torch.Generator().manual_seed(4)
    for _ in range(7):
        draw(straight, generator, 1.0)
        optimizer.step(1e-3)
    kept = {name: tensor.clone() for name, tensor in optimizer.state()}
    assert list(kept) == [f"{name}.{moment}" for name in SHAPES for moment in optimizer.moments]
    resumed = FakeParameters({name: straight.parameter(name).clone() for name in SHAPES})
    second = made(resumed)
    second.restore(kept, 7)
    state = generator.get_state()
    for parameters, each in ((straight, optimizer), (resumed, second)):
        generator.set_state(state)
        for _ in range(5):
            draw(parameters, generator, 1.0)
            each.step(1e-3)
        each.close()
    assert all(torch.equal(straight.parameter(name), resumed.parameter(name)) for name in SHAPES)


def test_sgd_has_no_state() -> None:
    sgd = Sgd(filled(0))
    assert list(sgd.state()) == []
    sgd.restore({}, 3)
    with pytest.raises(InternalError):
        sgd.restore({"a": torch.zeros(1)}, 3)
