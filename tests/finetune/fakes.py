"""Factors without a model, and a trainer that pulls their mean towards what the tokens say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexbatch.finetune.examples import Example

NAMES = {
    f"base_model.model.model.layers.0.self_attn.{module}.lora_{side}.weight": shape
    for module in ("q_proj", "v_proj")
    for side, shape in (("A", (4, 8)), ("B", (8, 4)))
}


class FakeParameters:
    """Named tensors with gradients."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        if tensors is None:
            generator = torch.Generator().manual_seed(0)
            tensors = {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}
        self._tensors = dict(tensors)
        self._gradients = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        return list(self._tensors)

    def parameter(self, name: str) -> Tensor:
        return self._tensors[name]

    def gradient(self, name: str) -> Tensor:
        return self._gradients[name]

    def zero(self) -> None:
        for gradient in self._gradients.values():
            gradient.zero_()


@dataclass(frozen=True)
class FakeLoss:
    total: float
    tokens: int


@dataclass
class FakeTrainer:
    """The loss of a token is the square of (the sum of all factors - token / 100). ``before(n)``: at call n.

    ``bad``: what is not a number, and from which call on.
    """

    parameters: FakeParameters
    before: Callable[[int], None] | None = None
    bad: tuple[str, int] | None = None
    calls: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    peak_activation_bytes: int = 1000
    closed: int = 0
    whole_steps: bool = False

    def accumulate(self, examples: Sequence[Example], scale: float, sizes: Sequence[int] = ()) -> FakeLoss:
        if self.before is not None:
            self.before(len(self.calls))
        self.calls.append((tuple(example.tokens[0] for example in examples), scale))
        level = sum(self.parameters.parameter(name).sum() for name in self.parameters.names())
        total, count = 0.0, 0
        for example in examples:
            for token, trained in zip(example.tokens, example.trained, strict=True):
                if trained:
                    gap = level - token / 100
                    for name in self.parameters.names():
                        self.parameters.gradient(name).add_(2 * gap * scale)
                    total += float(gap * gap)
                    count += 1
        what, call = self.bad or ("", 0)
        if what == "gradient" and len(self.calls) > call:
            self.parameters.gradient(self.parameters.names()[-1]).fill_(torch.nan)
        return FakeLoss(torch.nan if what == "loss" and len(self.calls) > call else total, count)

    def close(self) -> None:
        self.closed += 1
