"""Which rows each optimizer step takes, and its learning rate: pure numbers, so that a resumed run follows the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexbatch.finetune.options import FinetuneOptions, LrSchedule


@dataclass(frozen=True, slots=True)
class Course:
    """The steps of one training over ``rows`` rows, in the file's order, one epoch after the other.

    The last step of an epoch takes what is left of it.
    """

    rows: int
    batch_size: int
    grad_accumulation: int
    steps: int

    @classmethod
    def of(cls, options: FinetuneOptions, rows: int) -> Course:
        """The course that options ask for."""
        size, count = options.batch_size, options.grad_accumulation
        epoch = math.ceil(rows / (size * count))
        limits = []
        if options.epochs is not None or options.max_steps is None:
            limits.append((options.epochs or 1) * epoch)
        if options.max_steps is not None:
            limits.append(options.max_steps)
        return cls(rows, size, count, min(limits))

    @property
    def steps_per_epoch(self) -> int:
        """Steps that go over every row once."""
        return math.ceil(self.rows / (self.batch_size * self.grad_accumulation))

    def batches(self, step: int) -> list[range]:
        """The rows of step ``step`` (from 0), one range for each part that is in memory at a time."""
        first = step % self.steps_per_epoch * self.batch_size * self.grad_accumulation
        last = min(self.rows, first + self.batch_size * self.grad_accumulation)
        return [range(start, min(last, start + self.batch_size)) for start in range(first, last, self.batch_size)]


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate of every step: linear warm-up from 0, then constant, or half a cosine down to 0 at the end.

    The same as transformers' ``get_cosine_schedule_with_warmup`` and ``get_constant_schedule_with_warmup``.
    """

    peak: float
    steps: int
    warmup_steps: int
    schedule: LrSchedule

    def at(self, step: int) -> float:
        """The rate of step ``step`` (from 0)."""
        if step < self.warmup_steps:
            return self.peak * (step / self.warmup_steps)
        if self.schedule == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
