"""The loop: rows in file order become gradients, gradients become steps, and every so often a checkpoint.

Knows no files of rows and no model: a trainer turns examples into gradients, whatever stands behind it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from flexbatch.errors import DivergedError
from flexbatch.finetune.checkpoints import Checkpoint, Checkpoints, Record, restore
from flexbatch.finetune.examples import Example, Examples
from flexbatch.finetune.optimizer import NamedTensors, Optimizer, clip_gradients
from flexbatch.finetune.options import FinetuneOptions
from flexbatch.finetune.output import AdapterSettings
from flexbatch.finetune.schedule import Course, LearningRate
from flexbatch.jobs.identity import JobIdentity

Held = Callable[[], AbstractContextManager[None]]


class LossLike(Protocol):
    """The loss over some examples."""

    @property
    def total(self) -> float:
        """The sum over the tokens trained on, each minus the natural log of its probability."""


class TrainerLike(Protocol):
    """What turns examples into gradients."""

    @property
    def whole_steps(self) -> bool:
        """Whether it wants all batches of a step at once."""

    def accumulate(self, examples: Sequence[Example], scale: float, sizes: Sequence[int] = ()) -> LossLike:
        """Add the gradients of ``scale`` times the sum of the token losses, and return the loss.

        ``sizes``: of the batches that the examples make (none given: one).
        """

    @property
    def peak_activation_bytes(self) -> int:
        """The most memory that activations took."""

    def close(self) -> None:
        """Let go of the weights."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is: ``loss`` is of the last finished step, ``done`` and ``total`` count tokens."""

    step: int
    steps: int
    loss: float
    done: int
    total: int


Observer = Callable[[Progress], None]


class Training:
    """One adapter between its first step and its last.

    ``record`` says what has happened, ``kept_steps`` how much of it is kept. ``run`` may be left by any exception:
    ``save`` then keeps the steps that were finished.
    """

    def __init__(
        self,
        options: FinetuneOptions,
        course: Course,
        examples: Examples,
        parameters: NamedTensors,
        optimizer: Optimizer,
        checkpoints: Checkpoints,
        identity: JobIdentity,
        settings: AdapterSettings,
    ) -> None:
        self.record = Record()
        self.kept_steps = 0
        self._options = options
        self._course = course
        self._examples = examples
        self._parameters = parameters
        self._optimizer = optimizer
        self._checkpoints = checkpoints
        self._identity = identity
        self._settings = settings
        self._rate = LearningRate(options.learning_rate, course.steps, options.warmup_steps, options.lr_schedule)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises InputError where it is damaged."""
        restore(checkpoint, self._parameters, self._optimizer)
        self.record = checkpoint.record
        self.kept_steps = self.record.steps

    @property
    def examples_done(self) -> int:
        """Examples of all finished steps, those of earlier epochs counted again."""
        steps = range(self.record.steps)
        return sum(len(rows) for step in steps for rows in self._course.batches(step))

    def run(self, trainer: TrainerLike, observe: Observer, held: Held = nullcontext) -> None:
        """Do the steps that are left. What stands within ``held`` is done whole or not at all.

        Raises DivergedError when a number is no longer finite; the state before that is kept then.
        """
        total = sum(self._tokens(step) for step in range(self._course.steps))
        done = self.record.tokens
        for step in range(self.record.steps, self._course.steps):
            started = time.perf_counter()
            self._parameters.zero()
            targets = sum(self._examples.targets(row) for rows in self._course.batches(step) for row in rows)
            loss = 0.0
            batches = self._course.batches(step)
            for portion in [batches] if trainer.whole_steps else [[batch] for batch in batches]:
                examples = [self._examples[row] for rows in portion for row in rows]
                loss += trainer.accumulate(examples, 1.0 / targets, [len(rows) for rows in portion]).total
                done += sum(self._examples.length(row) for rows in portion for row in rows)
                last = self.record.losses[-1] if self.record.losses else loss / targets
                observe(Progress(self.record.steps, self._course.steps, last, done, total))
            loss /= targets
            self._require_finite(step, "loss", loss)
            self._require_finite(step, "gradient", clip_gradients(self._parameters, self._options.clip))
            with held():
                self._optimizer.step(self._rate.at(step))
                self.record.losses.append(loss)
                self.record.tokens += self._tokens(step)
                self.record.trained_tokens += targets
                self.record.seconds += time.perf_counter() - started
                peak = trainer.peak_activation_bytes
                self.record.peak_activation_bytes = max(self.record.peak_activation_bytes, peak)
            self._require_finite_parameters(step)
            observe(Progress(self.record.steps, self._course.steps, loss, done, total))
            if self.record.steps % self._options.save_every == 0 and self.record.steps < self._course.steps:
                with held():
                    self.save()

    def save(self) -> Path | None:
        """Keep the steps that are finished; return where, or None if there are none."""
        if self.record.steps == 0:
            return None
        if self.kept_steps != self.record.steps:
            self._checkpoints.save(self._identity, self.record, self._settings, self._parameters, self._optimizer)
            self.kept_steps = self.record.steps
        return self._checkpoints.place(self.record.steps)

    @property
    def kept(self) -> Path | None:
        """Where the last steps are that were kept, if any were."""
        return self._checkpoints.place(self.kept_steps) if self.kept_steps else None

    def _tokens(self, step: int) -> int:
        return sum(self._examples.length(row) for rows in self._course.batches(step) for row in rows)

    def _require_finite(self, step: int, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        kept = self.save()
        raise DivergedError(
            f"the training diverged: the {what} of step {step + 1} of {self._course.steps} is {value}: "
            + _remedy(self._rate.at(step), kept)
        )

    def _require_finite_parameters(self, step: int) -> None:
        if all(torch.isfinite(self._parameters.parameter(name)).all() for name in self._parameters.names()):
            return
        raise DivergedError(
            f"the training diverged: step {step + 1} of {self._course.steps} made the adapter infinite: "
            + _remedy(self._rate.at(step), self.kept)
        )


def _remedy(rate: float, kept: Path | None) -> str:
    lower = f"lower --learning-rate (it was {rate:.3g} there) or --clip, and start anew with --overwrite"
    return lower if kept is None else f"{lower}, or go on from {kept} with --init-from and another --output"
