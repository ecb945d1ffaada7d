"""Finetuning beside inference: one process, one set of weights, two jobs.

The job's thread asks for gradients as it would ask a ``Trainer``; they come about in the thread that runs inference's
sweeps: one layer of backward at a time as that layer passes by (riding), or in passes of their own between two sweeps
(reverse), as the policy says. Once inference is over, the same thread does what is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from flexbatch.errors import InternalError
from flexbatch.finetune.allowance import Allowance
from flexbatch.finetune.gradients import GradientSource, Loss
from flexbatch.finetune.inputs import SavedInputs
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trip import INPUT_STEPS, Trip
from flexbatch.finetune.work import TrainedTokens, Work, counts_of
from flexbatch.options import EngineOptions
from flexbatch.policy.coserving import CoservingPlan, inputs_tier, plan_coserving, reserved
from flexbatch.policy.footprint import ModelSize
from flexbatch.policy.machine import LANES, Machine
from flexbatch.policy.training import LOSS_BYTES, WINDOW, TrainingJob
from flexbatch.runtime.executor import Executor
from flexbatch.runtime.passenger import Loaded
from flexbatch.runtime.setup import disk_folder
from flexbatch.runtime.trace import Trace
from flexbatch.scheduler.lowering import Lowerer, Ride
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.training import Order, cut_batches
from flexbatch.scheduler.training_lowering import Passage, TrainingLowerer


class EndedError(InternalError):
    """Inference has ended by an error, and what rode on it with it."""


class CoServingTrainer(GradientSource):
    """Does for a job what ``Trainer`` does, as a passenger of an engine.

    ``share``: the part of the time that inference may lose to training. ``tokens``: of the largest call; a call waits
    until all of it has come back, so it should hold a whole step: ``whole_steps`` says so. ``kept`` (the tier of saved
    inputs) and ``order`` are the policy's unless given; ``plan`` says what it chose.
    """

    whole_steps = True

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
        order: Order | None = None,
    ) -> None:
        assert 0 < share < 1
        self.parameters = parameters
        self.plan: CoservingPlan | None = None
        self._options = options
        self._size = size
        self._window = window or WINDOW
        self._dropout, self._seed = dropout, seed
        self._share, self._kept, self._order = share, kept, order
        self._lowest = parameters.groups[0]
        self._job = TrainingJob(tokens, self._window, longest or tokens, parameters.elements, self._lowest)
        self._loaded: Loaded | None = None
        self._work: Work | None = None
        self._inputs: SavedInputs | None = None
        self._executor: Executor | None = None
        self._lowerer: TrainingLowerer | None = None
        self._trace = Trace(keep=False)
        self._joined = threading.Event()
        # Between the two threads there are only queues and plain assignments: a signal may strike anywhere, even where
        # a trip has been taken from its queue but not noted. So the job waits for any news, not only for a trip's end.
        self._asked: SimpleQueue[Trip | None] = SimpleQueue()
        self._news: SimpleQueue[None] = SimpleQueue()
        self._trip: Trip | None = None
        self._error: BaseException | None = None
        self._over = False
        self._boarded = False
        self._swept = 0  # tokens of inference's newest sweep
        self._paused = True  # nothing is on its way to the rings
        self._mark = 0.0
        self._moving_s: dict[str, float] = dict.fromkeys(INPUT_STEPS.values(), 0.0)
        self._moved_before = dict(self._moving_s)
        self._allowance = Allowance(share, overlap=options.overlap)
        self._passes = self._answered = 0
        self._owns_rings = False
        self.ridden = 0  # sweeps of inference that training was part of
        self.pauses = 0  # times that it went on between two of them

    # --- the job's side ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The job asks for no more."""
        self._asked.put(None)

    @property
    def peak_activation_bytes(self) -> int:
        """The most bytes in memory that hidden states, what backward keeps and gradients of either took: measured."""
        return 0 if self._work is None else self._work.peak

    def _pass(self, examples: Sequence[TrainedTokens], scale: float | None, sizes: Sequence[int]) -> Loss:
        self._joined.wait()
        self._check()
        assert self._loaded is not None
        assert self._work is not None
        assert self._inputs is not None
        assert self.plan is not None
        batches = cut_batches(counts_of(examples), sizes, self._window)
        if not batches:
            return Loss(0.0, 0)
        self._inputs.begin([batch.tokens for batch in batches], saving=scale is not None)
        self._work.begin(batches, examples, self.seen, scale)
        trip = Trip.of(batches, self._loaded.shape.num_layers, self._lowest, self.plan, training=scale is not None)
        self._asked.put(trip)
        while self._error is None and not trip.arrived:
            self._news.get()
        self._check()
        self._inputs.end()
        return Loss(*self._work.finish())

    def _check(self) -> None:
        if self._error is not None:
            raise EndedError(f"inference ended, and training with it: {self._error}") from self._error

    # --- the passenger's side ------------------------------------------------------------------------------------

    def reserve(self, machine: Machine) -> Machine:
        """What is left for inference; also decides where saved inputs rest."""
        self._kept = self._kept or inputs_tier(self._size, self._job, machine)
        return reserved(self._size, self._job, machine, self._kept)

    def join(self, loaded: Loaded) -> None:
        """The model is there: the policy can choose."""
        self._loaded = loaded
        batches = max(1, -(-self._job.tokens // max(self._window, 1)))
        self.plan = plan_coserving(
            self._size,
            self._job,
            loaded.plan,
            loaded.routes,
            loaded.profile,
            kept=self._kept or loaded.device.compute,
            share=self._share,
            batches=batches,
            order=self._order,
        )
        tiers = dict.fromkeys(range(max(1, self._lowest), loaded.shape.num_layers + 1), self.plan.kept)
        self.parameters.to(loaded.device.torch_device)
        self._inputs = SavedInputs(
            loaded.device,
            tiers,
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
        handlers = {"read": loaded.weights.read, "upload": loaded.weights.upload, **self._work.handlers()}
        self._executor = Executor(handlers, loaded.device, self._trace, overlap=self._options.overlap)
        self._lowerer = TrainingLowerer(loaded.routes, tiers)
        self._joined.set()

    def handlers(self) -> Mapping[str, Callable[[Step], None]]:
        """What its Steps do; transfers of saved inputs are timed, for they are no part of inference."""
        assert self._work is not None

        def timed(handler: Callable[[Step], None], resource: str) -> Callable[[Step], None]:
            def run(step: Step) -> None:
                started = time.perf_counter()
                handler(step)
                self._moving_s[resource] += time.perf_counter() - started

            return run

        found = self._work.handlers()
        return found | {kind: timed(found[kind], resource) for kind, resource in INPUT_STEPS.items()}

    def wants_pause(self) -> bool:
        """Passes between sweeps use the rings that weights are fetched to."""
        self._paused = self.plan is not None and self.plan.order == "reverse" and self._streams
        return self._paused

    def board(self, tokens: int) -> Ride | None:
        """The next sweep's part of what is under way, or what is done before it; nothing if inference lost enough."""
        self._boarded, self._swept = False, tokens
        if self._take() is None or self.plan is None:
            return None
        if self.plan.order == "reverse":
            self._go_between()
            return None
        trip = self._trip
        if trip is None or trip.riding is None:
            return None
        assert self._work is not None
        assert self._loaded is not None
        counts = [batch.tokens for batch in trip.batches]
        layers, budget_s = self._loaded.shape.num_layers, self._allowance.budget_s(tokens)
        entering, learning_s = self._work.pace.entering(trip.riding, counts, layers, budget_s)
        if not self._allowance.allows(tokens, learning_s):
            return None
        self._boarded = True
        self._mark, self._moved_before = self._work.seconds, dict(self._moving_s)
        tasks, routes, kept = trip.riding.sweep(entering), self._loaded.routes, self._tiers(trip)

        def ride(lowerer: Lowerer, group: int, weights: list[int]) -> list[int]:
            if trip.passage is None:
                trip.passage = Passage(lowerer, routes, trip.batches, kept)
            trip.passage.go_on(lowerer)
            return trip.passage.visit(group, tasks.get(group, ()), weights)

        return ride

    def arrive(self, seconds: float, busy: Mapping[str, float]) -> None:
        """Count the sweep and what inference lost by it, and let the job go on if all is back."""
        assert self._work is not None
        assert self._loaded is not None
        moved = {name: spent - self._moved_before[name] for name, spent in self._moving_s.items()}
        others = {name: spent - (moved.get(name, 0.0) if self._boarded else 0.0) for name, spent in busy.items()}
        products = others.pop(self._loaded.device.compute, 0.0)
        if not self._options.overlap:
            others = {}
        if not self._boarded:
            self._allowance.swept(self._swept, seconds, products, others)
            return
        self._allowance.shared(self._swept, seconds, self._work.seconds - self._mark, products, others)
        trip = self._trip
        if trip is not None:
            self.ridden += 1
            if trip.is_over:
                self._arrived(trip)

    def leave(self, error: BaseException | None) -> None:
        """No more sweeps for now; what is under way waits for others, or for ``drive``, or ends with the error."""
        self._paused = True
        if error is None:
            return
        self._error = error
        self._news.put(None)
        self.release()

    def drive(self) -> None:
        """Without inference: do what is under way and all that is asked for, until the job asks for no more."""
        try:
            while not self._over:
                trip = self._trip or self._asked.get()
                self._trip, self._over = trip, trip is None
                while trip is not None and not trip.is_over:
                    self._portion(trip, last=True)
                if trip is not None:
                    self._arrived(trip)
        finally:
            self.release()

    def release(self) -> None:
        """Let go of threads and files. The engine, whose weights these are, closes itself."""
        if self._executor is not None:
            self._executor.close()
        if self._inputs is not None:
            self._inputs.close()

    @property
    def progress(self) -> float:
        """Calls for gradients that are answered, and the part of the one under way that is done."""
        trip = self._trip
        return self._answered + (0.0 if trip is None else trip.progress)

    def stats(self) -> dict[str, Any]:
        """What was chosen, and what came of it: seconds of inference's sweeps, and those that it lost."""
        inputs = self._inputs
        return {
            "plan": None if self.plan is None else self.plan.to_json(),
            "sweeps_ridden": self.ridden,
            "pauses": self.pauses,
            "inference_s": self._allowance.inference_s,
            "lost_s": self._allowance.lost_s,
            "moved_bytes": {
                "disk_read": 0 if inputs is None else inputs.bytes_read,
                "disk_write": 0 if inputs is None else inputs.bytes_written,
            },
        }

    # --- parts ---------------------------------------------------------------------------------------------------

    @property
    def _streams(self) -> bool:
        assert self._loaded is not None
        return bool(self._loaded.routes.reads or self._loaded.routes.uploads)

    def _tiers(self, trip: Trip) -> dict[int, str]:
        assert self.plan is not None
        assert self._loaded is not None
        groups = range(max(1, self._lowest), self._loaded.shape.num_layers + 1)
        return dict.fromkeys(groups, self.plan.kept) if trip.training else {}

    def _take(self) -> Trip | None:
        """The trip that is under way, or the next one that was asked for."""
        if self._trip is None and not self._over:
            try:
                self._trip = self._asked.get_nowait()
            except Empty:
                return None
            self._over = self._trip is None
        return self._trip

    def _arrived(self, trip: Trip) -> None:
        self._trip = None
        self._answered += 1
        trip.arrived = True
        self._news.put(None)

    def _go_between(self) -> None:
        """Passes between two sweeps, as many as inference may wait for."""
        if not self._paused and self._streams:
            return  # the next sweep's weights are on their way already
        while (trip := self._trip) is not None and self._allowance.suffices:
            started = time.perf_counter()
            self._portion(trip, last=False)
            self._allowance.stopped(time.perf_counter() - started)
            self.pauses += 1
            if trip.is_over:
                self._arrived(trip)

    def _portion(self, trip: Trip, *, last: bool) -> None:
        """One pass over some micro-batches; ``last``: inference will not use the rings again."""
        assert self._executor is not None
        assert self._lowerer is not None
        if not self._owns_rings:
            self._lowerer.forget()
        self._owns_rings = last
        visits = trip.rest() if last and self._streams else trip.portion()
        lowered = self._lowerer.lower(visits, trip.batches, more=last, passage=trip.passage)
        self._executor.run(lowered.steps, self._passes, lowered.until)
        self._passes += 1
