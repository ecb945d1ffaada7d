"""One call for gradients on its way through the weights: what is done of it, what comes next. Touches no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from flexbatch.policy.coserving import CoservingPlan
from flexbatch.scheduler.steps import Kind, Resource
from flexbatch.scheduler.training import (
    LearningBatch,
    Riding,
    Task,
    Visit,
    forward_order,
    in_reverse,
    reverse_order,
)
from flexbatch.scheduler.training_lowering import Passage

INPUT_STEPS: Mapping[Kind, Resource] = {
    "input_down": "d2h",
    "input_write": "disk_write",
    "input_read": "disk_read",
    "input_up": "h2d",
}
"""Steps that move saved inputs, and what they keep busy."""


@dataclass(slots=True)
class Trip:
    """Micro-batches that are on their way together.

    On sweeps of inference as ``riding`` has it, or else by ``passes``, each one forward and back, of which ``done`` are
    over. ``arrived``: whether all is done and its gradients are there.
    """

    batches: list[LearningBatch]
    training: bool
    riding: Riding | None
    passes: list[list[Visit]]
    done: int = 0
    passage: Passage | None = None
    arrived: bool = False

    @classmethod
    def of(cls, batches: list[LearningBatch], layers: int, lowest: int, plan: CoservingPlan, *, training: bool) -> Self:
        """A trip in the plan's order; one that only measures the loss goes forward once."""
        count = len(batches)
        if plan.order == "riding":
            return cls(batches, training, Riding(layers, count, lowest if training else layers + 1), [])
        firsts = range(0, count, plan.together)
        sizes = [min(plan.together, count - first) for first in firsts]
        if training:
            passes = [reverse_order(layers, size, lowest, first) for first, size in zip(firsts, sizes, strict=True)]
        else:
            passes = [forward_order(layers, size, first) for first, size in zip(firsts, sizes, strict=True)]
        return cls(batches, training, None, passes)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.done >= len(self.passes) if self.riding is None else self.riding.is_over

    @property
    def progress(self) -> float:
        """The part that is done."""
        return self.done / len(self.passes) if self.riding is None else self.riding.done

    def portion(self) -> list[Visit]:
        """The next pass, which counts as done; of a trip that rides, all that is left."""
        if self.riding is not None:
            return self.rest()
        self.done += 1
        return self.passes[self.done - 1]

    def rest(self) -> list[Visit]:
        """All that is left, in one sweep forward and one back; it counts as done."""
        if self.riding is None:
            left = [_by_group(visits) for visits in self.passes[self.done :]]
            self.done = len(self.passes)
        else:
            left = []
            while not self.riding.is_over:
                left.append(self.riding.sweep(len(self.riding.waiting)))
        return in_reverse(left)


def _by_group(visits: Sequence[Visit]) -> dict[int, tuple[Task, ...]]:
    found: dict[int, tuple[Task, ...]] = {}
    for visit in visits:
        found[visit.group] = (*found.get(visit.group, ()), *visit.tasks)
    return found
