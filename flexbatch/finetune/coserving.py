"""Finetuning that rides on inference: one process, one stream of weights, two jobs.

The job's thread asks for gradients as it would ask a ``Trainer``; they come about in the thread that runs inference's
sweeps, one layer of backward at a time as that layer passes by. When there is no more inference, the job's thread does
what is left by itself, with the same weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexbatch.errors import InternalError
from flexbatch.finetune.inputs import SavedInputs
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trainer import Loss
from flexbatch.finetune.work import TrainedTokens, Work
from flexbatch.options import EngineOptions
from flexbatch.policy.footprint import ModelSize
from flexbatch.policy.machine import LANES
from flexbatch.policy.training import LOSS_BYTES, WINDOW, TrainingJob, riding_bytes
from flexbatch.runtime.executor import Executor
from flexbatch.runtime.passenger import Loaded
from flexbatch.runtime.setup import disk_folder
from flexbatch.runtime.trace import Trace
from flexbatch.scheduler.lowering import Lowerer, Ride
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.training import (
    LearningBatch,
    Task,
    Visit,
    cut,
    forward_order,
    reverse_order,
    riding_sweeps,
)
from flexbatch.scheduler.training_lowering import Passage, TrainingLowerer


@dataclass(slots=True)
class _Trip:
    """One call for gradients: its sweeps by group, of which ``done`` are over."""

    batches: list[LearningBatch]
    sweeps: list[dict[int, tuple[Task, ...]]]
    kept: dict[int, str]
    done: int = 0
    passage: Passage | None = None
    arrived: threading.Event = field(default_factory=threading.Event)


class RidingTrainer:
    """Does for a job what ``Trainer`` does, as a passenger of an engine.

    ``share``: the part of the time that may go to training while there is inference. ``tokens``: of the largest call.
    A call waits until its micro-batches have all come back, so it should hold many: a pipe of G micro-batches over L
    layers is G / (G + L) full. ``kept``: the tier of saved inputs (None: that of the products).
    """

    def __init__(
        self,
        parameters: Parameters,
        options: EngineOptions,
        size: ModelSize,
        *,
        window: int | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        tokens: int = 2048,
        longest: int | None = None,
        share: float = 0.2,
        kept: str | None = None,
    ) -> None:
        assert 0 < share < 1
        self._tier = kept
        self.seen = 0
        self.parameters = parameters
        self._options = options
        self._size = size
        self._window = window or WINDOW
        self._dropout, self._seed = dropout, seed
        self._share = share
        self._lowest = parameters.groups[0]
        self._job = TrainingJob(tokens, self._window, longest or tokens, parameters.elements, self._lowest)
        self._kept: dict[int, str] = {}
        self._loaded: Loaded | None = None
        self._work: Work | None = None
        self._inputs: SavedInputs | None = None
        self._trip: _Trip | None = None
        self._boarded = False
        self._alone = threading.Event()
        self._joined = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._learning_s = self._sweeping_s = 0.0
        self._newest_s = self._mark = 0.0
        self._executor: Executor | None = None
        self._lowerer: TrainingLowerer | None = None
        self._trace = Trace(keep=False)
        self._passes = 0
        self.ridden = 0  # sweeps of inference that training was part of

    # --- the job's side ------------------------------------------------------------------------------------------

    def accumulate(self, examples: Sequence[TrainedTokens], scale: float) -> Loss:
        """Add d(scale * sum of the targets' -log p) / d(A, B) to the gradients; waits until they are there."""
        loss = self._pass(examples, scale)
        self.seen += len(examples)
        return loss

    def evaluate(self, examples: Sequence[TrainedTokens]) -> Loss:
        """The loss, without dropout and gradients."""
        return self._pass(examples, None)

    def close(self) -> None:
        """End what was begun; the engine, whose weights these are, closes itself."""
        if self._executor is not None:
            self._executor.close()
        if self._inputs is not None:
            self._inputs.close()

    @property
    def peak_activation_bytes(self) -> int:
        """The most bytes in memory that hidden states, what backward keeps and gradients of either took: measured."""
        return 0 if self._work is None else self._work.peak

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of sweeps that were shared, and of training in them."""
        return {"sweeps": self._sweeping_s, "training": self._learning_s}

    def _pass(self, examples: Sequence[TrainedTokens], scale: float | None) -> Loss:
        self._joined.wait()
        self._check()
        assert self._loaded is not None
        assert self._work is not None
        assert self._inputs is not None
        counts = [max((at for at, is_target in enumerate(each.trained) if is_target), default=0) for each in examples]
        batches = cut(counts, self._window)
        if not batches:
            return Loss(0.0, 0)
        layers = self._loaded.shape.num_layers
        if scale is None:
            sweeps = [{visit.group: visit.tasks for visit in forward_order(layers, len(batches))}]
        else:
            sweeps = riding_sweeps(layers, len(batches), self._lowest)
        trip = _Trip(batches, sweeps, {} if scale is None else self._kept)
        self._inputs.begin([batch.tokens for batch in batches], saving=scale is not None)
        self._work.begin(batches, examples, self.seen, scale)
        with self._lock:
            alone = self._alone.is_set()
            if not alone:
                self._trip = trip
        if alone and scale is not None:
            self._run(reverse_order(layers, len(batches), self._lowest), trip)
        elif alone:
            self._run(forward_order(layers, len(batches)), trip)
        else:
            trip.arrived.wait()
            self._check()
            if trip.done < len(sweeps):
                left = [Visit(group, tasks) for sweep in sweeps[trip.done :] for group, tasks in sweep.items()]
                self._run(left, trip)
        self._inputs.end()
        return Loss(*self._work.finish())

    def _run(self, visits: Sequence[Visit], trip: _Trip) -> None:
        """Without inference."""
        assert self._loaded is not None
        assert self._work is not None
        loaded = self._loaded
        if self._executor is None or self._lowerer is None:
            handlers = {"read": loaded.weights.read, "upload": loaded.weights.upload, **self._work.handlers()}
            self._executor = Executor(handlers, loaded.device, self._trace, overlap=self._options.overlap)
            self._lowerer = TrainingLowerer(loaded.routes, self._kept)
        lowered = self._lowerer.lower(visits, trip.batches, passage=trip.passage)
        self._executor.run(lowered.steps, self._passes, lowered.until)
        self._passes += 1

    def _check(self) -> None:
        if self._error is not None:
            raise InternalError(f"inference ended, and training with it: {self._error}") from self._error

    # --- the passenger's side ------------------------------------------------------------------------------------

    def working_bytes(self, dtype: str) -> int:
        """Bytes of the tier of the products that riding takes."""
        return riding_bytes(self._size, self._job, dtype, below=self._tier is not None)

    def join(self, loaded: Loaded) -> None:
        """The model is there."""
        self._loaded = loaded
        tier = self._tier or loaded.device.compute
        self._kept = dict.fromkeys(range(max(1, self._lowest), loaded.shape.num_layers + 1), tier)
        self.parameters.to(loaded.device.torch_device)
        self._inputs = SavedInputs(
            loaded.device,
            self._kept,
            loaded.dtype,
            loaded.shape.hidden_size,
            LANES,
            Path(disk_folder(self._options)),
            self._options.rates,
        )
        self._work = Work(
            loaded.shape,
            loaded.family,
            loaded.weights,
            self.parameters,
            self._inputs,
            loaded.device,
            dropout=self._dropout,
            seed=self._seed,
            loss_bytes=LOSS_BYTES,
        )
        self._joined.set()

    def handlers(self) -> Mapping[str, Callable[[Step], None]]:
        """What its Steps do."""
        assert self._work is not None
        return self._work.handlers()

    def board(self) -> Ride | None:
        """The next sweep's part of what is under way, unless training has had its share of the time already."""
        self._boarded = False
        with self._lock:
            trip = self._trip
        allowed = self._share / (1 - self._share) * (self._sweeping_s - self._learning_s)
        if trip is None or (self._learning_s > 0 and self._learning_s + self._newest_s > allowed):
            return None
        tasks = trip.sweeps[trip.done]
        self._boarded = True
        assert self._work is not None
        assert self._loaded is not None
        self._mark = self._work.seconds
        routes = self._loaded.routes

        def ride(lowerer: Lowerer, group: int, weights: list[int]) -> list[int]:
            if trip.passage is None:
                trip.passage = Passage(lowerer, routes, trip.batches, trip.kept)
            trip.passage.go_on(lowerer)
            return trip.passage.visit(group, tasks.get(group, ()), weights)

        return ride

    def arrive(self, seconds: float) -> None:
        """Count the sweep, and let the job go on if all is back."""
        assert self._work is not None
        self._sweeping_s += seconds
        if not self._boarded:
            return
        self._newest_s = self._work.seconds - self._mark
        self._learning_s += self._newest_s
        trip = self._trip
        assert trip is not None
        trip.done += 1
        self.ridden += 1
        if trip.done == len(trip.sweeps):
            with self._lock:
                self._trip = None
            trip.arrived.set()

    def leave(self, error: BaseException | None) -> None:
        """No more sweeps: the job goes on alone, or ends."""
        with self._lock:
            self._error = error
            self._alone.set()
            trip, self._trip = self._trip, None
        self._joined.set()
        if trip is not None:
            trip.arrived.set()
