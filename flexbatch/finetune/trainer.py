"""The trainer: examples in, gradients of the adapter's factors out, with the base model's weights on any tier.

It knows neither files of data nor optimizers; those stand on top of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch

from flexbatch.checkpoint.four_bits import open_weights
from flexbatch.checkpoint.locate import ModelFolder
from flexbatch.errors import InternalError
from flexbatch.finetune.gradients import GradientSource, Loss
from flexbatch.finetune.inputs import SavedInputs
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.work import TrainedTokens, Work, counts_of
from flexbatch.memory.direct import DirectReader
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.options import EngineOptions
from flexbatch.policy.machine import LANES
from flexbatch.policy.profile import HardwareProfile
from flexbatch.policy.simulator import SweepTiming
from flexbatch.policy.training import WINDOW, TrainingJob, plan_training
from flexbatch.policy.training_time import pass_timing
from flexbatch.runtime.allocator import keep_freed_blocks
from flexbatch.runtime.executor import Executor
from flexbatch.runtime.setup import disk_folder, machine_for, open_device
from flexbatch.runtime.trace import Trace
from flexbatch.runtime.units import unit_sizes, units_of
from flexbatch.runtime.weight_store import Progress, WeightStore
from flexbatch.scheduler.training import Order, Visit, cut_batches, forward_order, reverse_order, riding_order
from flexbatch.scheduler.training_lowering import TrainingLowerer


class Trainer(GradientSource):
    """One loaded base model and the adapter that is trained on it.

    ``window``: tokens that are computed together (None: 512). ``dropout`` is PEFT's, on the adapters' inputs; its masks
    follow from ``seed``, from how many examples came before (``seen``, to be set when a run is resumed) and from
    positions. ``tokens``: of all examples of the largest call, ``longest``: of the longest one; the plan's memory holds
    for these. ``order``: a reverse sweep, or riding on sweeps that only go forward.

    Raises DoesNotFitError if that does not fit, ModelError if weights cannot be read, UsageError for options that this
    machine cannot follow.
    """

    whole_steps = False

    def __init__(
        self,
        folder: ModelFolder,
        parameters: Parameters,
        options: EngineOptions,
        *,
        window: int | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        tokens: int = 2048,
        longest: int | None = None,
        order: Order = "reverse",
        progress: Progress | None = None,
        trace: bool = False,
    ) -> None:
        assert 0 <= dropout < 1
        self.parameters = parameters
        self._order: Order = order
        self._window = window or WINDOW
        shape = folder.shape
        family = family_of(shape)
        table = family.table(shape)
        checkpoint = open_weights(folder, table, bits=options.weight_bits, progress=progress)
        units = units_of(table, checkpoint, shape.vocab_size, whole=True)
        self._shape = shape
        self._device = open_device(options)
        machine = machine_for(options, self._device, folder.native_dtype or shape.stored_dtype)
        groups = parameters.groups
        if not groups:
            raise InternalError("an adapter without modules")
        self._lowest = groups[0]
        job = TrainingJob(tokens, self._window, longest or tokens, parameters.elements, self._lowest)
        self._size, self._units = model_size(shape, table), unit_sizes(units)
        self.plan = plan_training(self._size, self._units, job, options, machine, stored_dtype=shape.stored_dtype)
        self._reader = DirectReader(rate=options.rates.get("disk_read"))
        tiers = self.plan.tiers
        weights = WeightStore(
            table, checkpoint, units, tiers, self._device, self._reader, self.plan, progress=progress, blocked=False
        )
        keep_freed_blocks(self.plan.memory[machine.compute].working)
        parameters.to(self._device.torch_device)
        self._routes = weights.routes()
        dtype: torch.dtype = getattr(torch, self.plan.dtype)
        self._inputs = SavedInputs(
            self._device,
            self.plan.kept,
            dtype,
            shape.hidden_size,
            LANES,
            disk_folder(options),
            options.rates,
        )
        self.work = Work(
            shape, family, weights, parameters, self._inputs, self._device, dropout=dropout, seed=seed,
            loss_bytes=self.plan.loss_bytes,
        )  # fmt: skip
        self._trace = Trace(keep=trace)
        self._executor = Executor(
            {"read": weights.read, "upload": weights.upload, **self.work.handlers()},
            self._device,
            self._trace,
            overlap=self.plan.overlap,
        )
        self._lowerer = TrainingLowerer(self._routes, self.plan.kept)
        self._passes = 0
        self._seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def peak_activation_bytes(self) -> int:
        """The most bytes in memory that hidden states, what backward keeps and gradients of either took: measured."""
        return self.work.peak

    def predict(self, examples: Sequence[TrainedTokens], profile: HardwareProfile) -> SweepTiming:
        """How long ``accumulate`` would take on a machine of these figures: its Steps on the simulator."""
        batches = cut_batches(counts_of(examples), [len(examples)], self._window)
        visits = self._visits(len(batches), training=True)
        return pass_timing(self._size, self._units, self.plan, visits, batches, profile, self._device.compute)

    def stats(self) -> dict[str, Any]:
        """What has been moved, in bytes, how long resources were busy, and the peaks."""
        return {
            "passes": self._passes,
            "seconds": self._seconds,
            "moved_bytes": {
                "h2d": self._device.moved["h2d"],
                "d2h": self._device.moved["d2h"],
                "disk_read": self._reader.bytes_read + self._inputs.bytes_read,
                "disk_write": self._inputs.bytes_written,
            },
            "busy_s": dict(self._trace.busy_s),
            "step_s": dict(self._trace.kind_s),
            "peak_activation_bytes": self.work.peak,
            "peak_bytes": {"gpu": self._device.gpu_peak, "disk": self._inputs.disk_bytes},
        }

    def close(self) -> None:
        """Let go of weights and files, and end all threads."""
        self._executor.close()
        self._inputs.close()
        self._reader.close()
        self._device.close()

    def _pass(self, examples: Sequence[TrainedTokens], scale: float | None, sizes: Sequence[int]) -> Loss:
        started = time.perf_counter()
        batches = cut_batches(counts_of(examples), sizes, self._window)
        if not batches:
            return Loss(0.0, 0)
        training = scale is not None
        lowered = self._lowerer.lower(self._visits(len(batches), training=training), batches)
        self._inputs.begin([batch.tokens for batch in batches], saving=training)
        self.work.begin(batches, examples, self.seen, scale)
        try:
            self._executor.run(lowered.steps, self._passes, lowered.until)
        finally:
            self._inputs.end()
        self._passes += 1
        total, tokens = self.work.finish()
        self._seconds += time.perf_counter() - started
        return Loss(total, tokens)

    def _visits(self, batches: int, *, training: bool) -> list[Visit]:
        layers = self._shape.num_layers
        if not training:
            return forward_order(layers, batches)
        return (riding_order if self._order == "riding" else reverse_order)(layers, batches, self._lowest)
