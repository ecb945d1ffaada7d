"""The trained factors of a LoRA adapter and their gradients, in fp32, by PEFT's names and as products want them.

Knows how factors are named, shaped and begun; neither how gradients come about nor what becomes of them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from flexbatch.errors import UsageError
from flexbatch.lora.adapter import AdapterPart
from flexbatch.lora.config import AdapterConfig
from flexbatch.lora.load import FactorReader
from flexbatch.lora.modules import ALL_LINEAR, Module, is_target, modules_of
from flexbatch.lora.reader import AdapterReader
from flexbatch.lora.runs import Spot, runs_of
from flexbatch.models.registry import family_of
from flexbatch.shapes import ModelShape

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Trained:
    """One module with an adapter: ``scale * b @ a`` is added to its weight. a [rank, in], b [out, rank]."""

    module: Module
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Part:
    """The factors of one module inside its linear: rows of the stacked ``a``, columns of the linear's output.

    ``b`` and ``b_gradient`` [out of the module, rank]; ``key`` tells its dropout from that of other modules.
    """

    rows: slice
    columns: slice
    scale: float
    b: Tensor
    b_gradient: Tensor
    key: int


@dataclass(frozen=True, slots=True)
class LinearFactors:
    """All adapters of one linear: the ``a`` of its modules stacked, [sum of ranks, in], so that one product serves."""

    a: Tensor
    a_gradient: Tensor
    parts: tuple[Part, ...]


class Parameters:
    """A and B of every trained module, fp32, with gradients of the same shapes, which begin as zeros.

    Tensors that ``parameter`` and ``gradient`` return are the ones that training reads and adds to.
    """

    def __init__(self, trained: Sequence[Trained]) -> None:
        self.trained = tuple(trained)
        self._tensors: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._linears: dict[tuple[int, str], LinearFactors] = {}
        self._bind(
            {name: torch.zeros(shape) for name, shape in self.shapes().items()},
            {name: torch.zeros(shape) for name, shape in self.shapes().items()},
            torch.device("cpu"),
        )

    @classmethod
    def create(
        cls, shape: ModelShape, *, rank: int, alpha: float, target_modules: str | Sequence[str], seed: int
    ) -> Self:
        """An untrained adapter: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5, as PEFT's), B zero.

        ``target_modules``: ``all-linear``, or names of modules as PEFT takes them. Raises UsageError on others.
        """
        chosen = chosen_modules(shape, rank, alpha, target_modules)
        made = cls([Trained(module, rank, alpha / rank) for module in chosen])
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in made.items():
            if name.endswith(".lora_A.weight"):
                bound = 1 / math.sqrt(tensor.shape[1])
                tensor.copy_((torch.rand(tensor.shape, generator=generator) * 2 - 1) * bound)
        return made

    @classmethod
    def read(cls, shape: ModelShape, folder: Path) -> Self:
        """The adapter in ``folder``, to be trained further. Raises AdapterError if it does not fit the model."""
        adapter = AdapterReader(family_of(shape).table(shape), shape.family).open(folder.name, folder)
        made = cls([Trained(part.module, part.rank, part.scale) for part in adapter.parts])

        numbers = {part.module.name: number for number, part in enumerate(adapter.parts)}
        targets: list[Tensor] = []
        for part in adapter.parts:
            a, b = (made.parameter(name) for name in names_of(part.module))
            targets += [a, b.t()]

        def spots(part: AdapterPart) -> tuple[Spot, Spot]:  # every tensor is a stretch of memory of its own
            return (2 * numbers[part.module.name], 0), (2 * numbers[part.module.name] + 1, 0)

        FactorReader().read(adapter, runs_of(adapter.parts, spots), lambda run: targets[run.stretch][None])
        return made

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every tensor by its name in a PEFT file, in the model's order, A before B."""
        shapes: dict[str, tuple[int, int]] = {}
        for each in self.trained:
            a, b = names_of(each.module)
            shapes[a] = (each.rank, each.module.in_features)
            shapes[b] = (each.module.out_features, each.rank)
        return shapes

    def names(self) -> list[str]:
        """The names of all tensors as a PEFT file has them, in the model's order, A before B."""
        return list(self._tensors)

    def items(self) -> list[tuple[str, Tensor]]:
        """Every name with its tensor."""
        return list(self._tensors.items())

    def parameter(self, name: str) -> Tensor:
        """The tensor ``name``, to be read and changed in place."""
        return self._tensors[name]

    def gradient(self, name: str) -> Tensor:
        """The sum of the gradients of ``name`` since ``zero``."""
        return self._gradients[name]

    def zero(self) -> None:
        """Set all gradients to zero."""
        for gradient in self._gradients.values():
            gradient.zero_()

    def to(self, device: torch.device) -> None:
        """Bring all tensors to ``device``, where products run; those returned before are no longer the ones in use."""
        if any(tensor.device != device for tensor in self._tensors.values()):
            self._bind(self._tensors, self._gradients, device)

    def of(self, group: int, linear: str) -> LinearFactors | None:
        """The factors of a linear of a group; None if none of its modules is trained."""
        return self._linears.get((group, linear))

    @property
    def groups(self) -> tuple[int, ...]:
        """Groups with something to train, the lowest first."""
        return tuple(sorted({group for group, _ in self._linears}))

    @property
    def elements(self) -> int:
        """Numbers in all factors."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    def _bind(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], device: torch.device) -> None:
        """Lay the tensors out on ``device``: the A of one linear end to end, each of them a view."""
        together: dict[tuple[int, str], list[Trained]] = {}
        for each in self.trained:
            together.setdefault((each.module.group, each.module.linear), []).append(each)
        tensors, sums = dict(values), dict(gradients)
        for key, members in together.items():
            ranks = sum(each.rank for each in members)
            a = torch.empty(ranks, members[0].module.in_features, device=device)
            a_gradient = torch.empty_like(a)
            parts: list[Part] = []
            row = 0
            for each in members:
                a_name, b_name = names_of(each.module)
                rows = slice(row, row + each.rank)
                row += each.rank
                sums[a_name] = a_gradient[rows].copy_(sums[a_name])
                tensors[a_name] = a[rows].copy_(tensors[a_name])
                tensors[b_name], sums[b_name] = tensors[b_name].to(device), sums[b_name].to(device)
                columns = slice(each.module.column, each.module.column + each.module.out_features)
                number = zlib.crc32(each.module.name.encode())
                parts.append(Part(rows, columns, each.scale, tensors[b_name], sums[b_name], number))
            self._linears[key] = LinearFactors(a, a_gradient, tuple(parts))
        self._tensors, self._gradients = tensors, sums


def chosen_modules(shape: ModelShape, rank: int, alpha: float, target_modules: str | Sequence[str]) -> list[Module]:
    """The modules that ``target_modules`` names, in the model's order. Raises UsageError for one that is not there."""
    modules = modules_of(family_of(shape).table(shape))
    names = _listed(target_modules)
    config = AdapterConfig(rank, alpha, False, names, frozenset(), None, (), (), ())
    if not isinstance(names, str):
        _check_targets(names, config, modules, shape.family)
    return [module for name, module in modules.items() if is_target(config, name, shape.family)]


def names_of(module: Module) -> tuple[str, str]:
    """The names of a module's two factors in a PEFT file."""
    return f"{PREFIX}{module.name}.lora_A.weight", f"{PREFIX}{module.name}.lora_B.weight"


def _listed(targets: str | Sequence[str]) -> str | frozenset[str]:
    names = frozenset(targets.split(",") if isinstance(targets, str) else targets)
    return ALL_LINEAR if names == {ALL_LINEAR} else names


def _check_targets(names: frozenset[str], config: AdapterConfig, modules: Mapping[str, Module], family: str) -> None:
    known = sorted({name.rsplit(".", 1)[-1] for name in modules})
    for name in sorted(names):
        alone = AdapterConfig(config.rank, config.alpha, False, frozenset({name}), frozenset(), None, (), (), ())
        if not any(is_target(alone, module, family) for module in modules):
            raise UsageError(
                f"--target-modules: the model has no linear module {name!r}: it has {', '.join(known)}; or all-linear"
            )
    if not names:
        raise UsageError(f"--target-modules: name one of {', '.join(known)}, or all-linear")
