"""Examples in, gradients of an adapter's factors out: what every way of getting them has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from flexbatch.finetune.work import TrainedTokens


@dataclass(frozen=True, slots=True)
class Loss:
    """The sum of -log p over ``tokens`` targets."""

    total: float
    tokens: int


class GradientSource(ABC):
    """``seen``: how many examples came before, which dropout's masks follow from; to be set when a run is resumed."""

    seen = 0

    def accumulate(self, examples: Sequence[TrainedTokens], scale: float, sizes: Sequence[int] = ()) -> Loss:
        """Add d(scale * sum of the targets' -log p) / d(A, B) to the gradients; they are there when this returns.

        ``sizes``: of the batches that the examples make (none given: one).
        """
        loss = self._pass(examples, scale, sizes or [len(examples)])
        self.seen += len(examples)
        return loss

    def evaluate(self, examples: Sequence[TrainedTokens]) -> Loss:
        """The loss, without dropout and gradients."""
        return self._pass(examples, None, [len(examples)])

    @abstractmethod
    def _pass(self, examples: Sequence[TrainedTokens], scale: float | None, sizes: Sequence[int]) -> Loss:
        """The loss of batches of ``sizes`` examples, and their gradients unless ``scale`` is None."""
