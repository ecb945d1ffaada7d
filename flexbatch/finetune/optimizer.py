"""AdamW and SGD over named fp32 tensors, step for step as torch computes them; moments rest in memory or in a file.

Knows nothing of models, of what the tensors are, or of where gradients come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flexbatch.errors import InternalError
from flexbatch.finetune.options import FinetuneOptions
from flexbatch.memory.aligned import align_up, aligned_buffer
from flexbatch.memory.spill import SpillFile

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class NamedTensors(Protocol):
    """Tensors that are learned, with their gradients, fp32, by name."""

    def names(self) -> list[str]:
        """All names, always in the same order."""

    def parameter(self, name: str) -> Tensor:
        """The tensor itself."""

    def gradient(self, name: str) -> Tensor:
        """Its gradient, of the same shape."""

    def zero(self) -> None:
        """Set all gradients to zero."""


class Optimizer(Protocol):
    """Applies gradients; its state can be kept and given back. ``moments`` are what it keeps for each parameter."""

    moments: tuple[str, ...]

    def step(self, rate: float) -> None:
        """Change every parameter by its gradient."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that the next step depends on, by name; each is valid until the next one is asked for."""

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take over what ``state`` gave after ``steps`` steps."""

    def close(self) -> None:
        """Let go of everything."""


def gradient_norm(trained: NamedTensors) -> float:
    """The 2-norm of all gradients together; infinite or NaN where one of them is."""
    return _norm(trained).item()


def clip_gradients(trained: NamedTensors, limit: float) -> float:
    """Scale all gradients so that their norm is at most ``limit`` (0: never), and return what it was."""
    norm = _norm(trained)
    if limit > 0:
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        for name in trained.names():
            trained.gradient(name).mul_(factor)
    return norm.item()


def _norm(trained: NamedTensors) -> Tensor:
    each = [torch.linalg.vector_norm(trained.gradient(name)) for name in trained.names()]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(each))
    return norm


def make_optimizer(options: FinetuneOptions, trained: NamedTensors, folder: Path) -> Optimizer:
    """The optimizer that options ask for; ``folder`` is where states go that rest on the disk."""
    if options.optimizer == "sgd":
        return Sgd(trained, weight_decay=options.weight_decay)
    places = FileMoments(trained, folder) if options.optimizer_states == "disk" else MemoryMoments(trained)
    return AdamW(trained, places, weight_decay=options.weight_decay)


class AdamW:
    """AdamW as in Loshchilov and Hutter (2019), in the order of operations of ``torch.optim.AdamW``."""

    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self, trained: NamedTensors, places: Moments, *, weight_decay: float = 0.0) -> None:
        self._trained = trained
        self._places = places
        self._decay = weight_decay
        self._steps = 0

    def step(self, rate: float) -> None:
        """Change every parameter by its gradient, with its moments."""
        self._steps += 1
        first_beta, second_beta = _BETAS
        step_size = rate / (1 - first_beta**self._steps)
        second_root = (1 - second_beta**self._steps) ** 0.5
        for name in self._trained.names():
            average, square = self._places.read(name)
            at_work = self._trained.parameter(name)
            # The update is made where the moments rest: both factors of a module are small, its moments twice that.
            parameter = at_work.to(average.device)
            gradient = self._trained.gradient(name).to(average.device)
            parameter.mul_(1 - rate * self._decay)
            average.lerp_(gradient, 1 - first_beta)
            square.mul_(second_beta).addcmul_(gradient, gradient, value=1 - second_beta)
            self._places.write(name)
            denominator = (square.sqrt() / second_root).add_(_EPSILON)
            parameter.addcdiv_(average, denominator, value=-step_size)
            if parameter is not at_work:
                at_work.copy_(parameter)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Both moments of every parameter."""
        for name in self._trained.names():
            for moment, tensor in zip(self.moments, self._places.read(name), strict=True):
                yield f"{name}.{moment}", tensor

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take over the moments after ``steps`` steps."""
        for name in self._trained.names():
            for moment, tensor in zip(self.moments, self._places.read(name), strict=True):
                tensor.copy_(tensors[f"{name}.{moment}"])
            self._places.write(name)
        self._steps = steps

    def close(self) -> None:
        """Let go of the moments."""
        self._places.close()


class Sgd:
    """Plain gradient descent, as ``torch.optim.SGD`` without momentum. It has no state."""

    moments: tuple[str, ...] = ()

    def __init__(self, trained: NamedTensors, *, weight_decay: float = 0.0) -> None:
        self._trained = trained
        self._decay = weight_decay

    def step(self, rate: float) -> None:
        """Change every parameter by its gradient."""
        for name in self._trained.names():
            parameter, gradient = self._trained.parameter(name), self._trained.gradient(name)
            if self._decay:
                gradient = gradient.add(parameter, alpha=self._decay)
            parameter.add_(gradient, alpha=-rate)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Nothing."""
        return iter(())

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Nothing to take over."""
        del steps
        if tensors:
            raise InternalError("SGD has no state, but some was kept")

    def close(self) -> None:
        """Nothing to let go of."""


class Moments(Protocol):
    """Two fp32 tensors for each parameter, zero at first."""

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Both, to be changed in place; valid until the next ``read``."""

    def write(self, name: str) -> None:
        """Keep what was changed of the ones last read."""

    def close(self) -> None:
        """Let go of them."""


class MemoryMoments:
    """Moments in RAM: eight bytes for each number that is learned."""

    def __init__(self, trained: NamedTensors) -> None:
        self._tensors = {
            name: (torch.zeros(trained.parameter(name).shape), torch.zeros(trained.parameter(name).shape))
            for name in trained.names()
        }

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Both moments themselves."""
        return self._tensors[name]

    def write(self, name: str) -> None:
        """They are where they belong."""

    def close(self) -> None:
        """Free them."""
        self._tensors.clear()


class FileMoments:
    """Moments in a file without a name in ``folder``; in RAM are those of the largest parameter only.

    Raises DoesNotFitError where the disk is full.
    """

    def __init__(self, trained: NamedTensors, folder: Path) -> None:
        self._shapes = {name: trained.parameter(name).shape for name in trained.names()}
        self._places: dict[str, int] = {}
        end = 0
        for name, shape in self._shapes.items():
            self._places[name] = end
            end += 2 * align_up(4 * shape.numel())
        self._file = SpillFile(folder, end)
        largest = max((shape.numel() for shape in self._shapes.values()), default=0)
        self._buffer = aligned_buffer(2 * align_up(4 * largest))

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Both moments, read from the file into one buffer that all share."""
        self._file.read(self._places[name], self._lent(name))
        shape = self._shapes[name]
        half = align_up(4 * shape.numel())
        first, second = (
            self._buffer[start : start + 4 * shape.numel()].view(torch.float32).view(shape) for start in (0, half)
        )
        return first, second

    def write(self, name: str) -> None:
        """Write back what ``read`` of the same name gave last."""
        self._file.write(self._places[name], self._lent(name))

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def _lent(self, name: str) -> Tensor:
        return self._buffer[: 2 * align_up(4 * self._shapes[name].numel())]
