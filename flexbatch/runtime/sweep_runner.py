"""Carries sweeps out: binds each kind of Step to weights, KV pages, hidden states, the family's wiring and the head.

It knows where things are; it does not know why these tokens were chosen or what becomes of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flexbatch.kernels.attention import attend
from flexbatch.kernels.paged import store_paged
from flexbatch.kernels.rotary import RotaryTable
from flexbatch.memory.aligned import align_up
from flexbatch.memory.kv import KVMemory
from flexbatch.models.spec import Family
from flexbatch.policy.plan import Plan
from flexbatch.runtime.adapter_store import AdapterStore
from flexbatch.runtime.context import BoundContext
from flexbatch.runtime.device import Device
from flexbatch.runtime.executor import Executor
from flexbatch.runtime.hidden import HiddenMoves
from flexbatch.runtime.kv_moves import KVMoves
from flexbatch.runtime.micro_batch import MicroBatchState, Readout, start
from flexbatch.runtime.packed_kv import PackedKV
from flexbatch.runtime.passenger import Passenger
from flexbatch.runtime.readout import read
from flexbatch.runtime.trace import Trace
from flexbatch.runtime.weight_store import WeightStore
from flexbatch.scheduler.lowering import Lowerer, Routes
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.sweep import Slice, Sweep
from flexbatch.shapes import ModelShape

_HOST = torch.device("cpu")


@dataclass(slots=True)
class _Flight:
    """The state of the sweep that is under way: one entry a micro-batch."""

    states: list[MicroBatchState] = field(default_factory=list)
    readouts: list[list[Readout]] = field(default_factory=list)


class SweepRunner:
    """Runs the sweeps of one job."""

    def __init__(
        self,
        *,
        shape: ModelShape,
        family: Family,
        weights: WeightStore,
        kv: KVMemory,
        hidden: HiddenMoves,
        rotary: RotaryTable | None,
        plan: Plan,
        routes: Routes,
        device: Device,
        trace: Trace,
        adapters: AdapterStore | None = None,
        delays: Callable[[Step], float] | None = None,
        passenger: Passenger | None = None,
        packing: PackedKV | None = None,
    ) -> None:
        self._shape = shape
        self._packing = packing
        self._family = family
        self._weights = weights
        self._kv = KVMoves(kv, routes, device)
        self._hidden = hidden
        self._rotary = rotary
        self._plan = plan
        self._windows = frozenset(shape.windows)
        self._dtype: torch.dtype = getattr(torch, plan.dtype)
        self._adapters = adapters
        self._flight = _Flight()
        self._routes = routes
        self._device = device
        self._lowerer = Lowerer(routes)
        handlers: dict[str, Callable[[Step], None]] = {
            "read": weights.read,
            "upload": weights.upload,
            "gather": self._gather,
            "embed": self._embed,
            "hidden_read": lambda step: hidden.read(self._state(step)),
            "hidden_up": lambda step: hidden.up(self._state(step)),
            "hidden_down": lambda step: hidden.down(self._state(step)),
            "hidden_write": lambda step: hidden.write(self._state(step)),
            "kv_read": self._kv_read,
            "kv_up": self._kv_up,
            "kv_down": self._kv_down,
            "kv_write": self._kv_write,
            "project": self._project,
            "qkv_down": lambda step: hidden.qkv_down(self._state(step)),
            "attend": self._attend,
            "attended_up": lambda step: hidden.attended_up(self._state(step)),
            "finish": self._finish,
            "head": self._head,
        }
        if adapters is not None:
            handlers |= {"adapter_read": adapters.read, "adapter_up": adapters.up}
        if passenger is not None:
            handlers |= passenger.handlers()
        self._passenger = passenger
        self._trace = trace
        self._executor = Executor(handlers, device, trace, overlap=plan.overlap, delays=delays)

    def run(self, sweep: Sweep, *, more: bool) -> list[tuple[Slice, Readout]]:
        """Compute ``sweep``, store its KV, and return what the head read off each slice.

        ``more``: another sweep follows, whose first weights are fetched under the end of this one.
        """
        flight = _Flight()
        offset = 0
        if self._adapters is not None:
            self._adapters.begin(sweep.adapters)
        for batch in sweep.micro_batches:
            state = start(
                batch,
                self._plan.page_tokens,
                self._windows,
                self._rotary,
                self._dtype,
                hidden_size=self._shape.hidden_size,
                hidden_offset=offset,
                staging=self._kv.stage(batch),
                attends=self._device.torch_device if self._routes.attends_on(batch) == "gpu" else _HOST,
                cascade=self._plan.kv_bits == 16,
                packed=self._plan.kv_bits == 4,
            )
            if self._adapters is not None:
                state.adapters = self._adapters.bind(batch)
            offset += align_up(state.hidden_bytes)
            flight.states.append(state)
            flight.readouts.append([])
        if self._packing is not None:
            self._packing.prepare(flight.states, self._plan.page_tokens)
        self._flight = flight
        passenger = self._passenger
        ride = None if passenger is None else passenger.board(sum(batch.tokens for batch in sweep.micro_batches))
        started, busy = time.perf_counter(), dict(self._trace.busy_s)
        if passenger is not None and passenger.wants_pause():
            more = False
        lowered = self._lowerer.lower(sweep, more=more, ride=ride)
        with torch.inference_mode():
            self._executor.run(lowered.steps, sweep.number, lowered.until)
        if passenger is not None:
            seconds = time.perf_counter() - started
            spent = {name: after - busy.get(name, 0.0) for name, after in dict(self._trace.busy_s).items()}
            passenger.arrive(seconds, spent)
        for state in flight.states:
            self._hidden.settle(state)
        self._flight = _Flight()
        return list(zip(sweep.slices, [readout for batch in flight.readouts for readout in batch], strict=True))

    def close(self) -> None:
        """End the executor's threads."""
        self._executor.close()

    # --- handlers ------------------------------------------------------------------------------------------------

    def _state(self, step: Step) -> MicroBatchState:
        return self._flight.states[step.batch]

    def _context(self, step: Step, state: MicroBatchState) -> BoundContext:
        weights = self._weights.group(step.group)
        return BoundContext(
            self._shape, state.positions, weights, state.rotation, state.rows, step.group, state.adapters
        )

    def _gather(self, step: Step) -> None:
        state = self._state(step)
        state.rows = self._weights.gather(state.host_ids)

    def _embed(self, step: Step) -> None:
        state = self._state(step)
        state.to(self._device.torch_device)
        state.x = self._family.embed(self._context(step, state), state.ids)
        state.rows = None

    def _project(self, step: Step) -> None:
        state = self._state(step)
        q, k, v = self._family.project(self._context(step, state), state.hidden())
        if self._routes.attends_on(state.batch) != self._device.compute:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # here, on the stream that made them
        state.qkv = (q, k, v)

    def _attend(self, step: Step) -> None:
        state = self._state(step)
        index = step.group - 1
        assert state.qkv is not None
        q, k, v = state.qkv
        if self._packing is not None and self._packing.observes:
            output = self._weights.group(step.group).linears["out"]
            state.attended = self._packing.observe(index, q, k, v, self._shape.scale_of(index), output)
            state.qkv = None
            return
        layer = self._kv.layer(step, state.batch, state.staging)
        batch, scale = state.attention[self._shape.windows[index]], self._shape.scale_of(index)
        if self._packing is not None:
            state.attended = self._packing.attend(index, state, batch, layer, (q, k, v), scale)
        else:
            store_paged(layer, state.pages, state.offsets, k, v, state.key_rows(k.shape[1], layer.shape[3]))
            state.attended = attend(batch, layer, q, k, v, scale)
        state.qkv = None

    def _finish(self, step: Step) -> None:
        state = self._state(step)
        assert state.attended is not None
        state.x = self._family.finish(self._context(step, state), state.hidden(), state.attended)
        state.attended = None

    def _head(self, step: Step) -> None:
        state = self._state(step)
        context = self._context(step, state)

        def head(x: Tensor, rows: SequenceOf[int]) -> Tensor:
            adapters = None if context.adapters is None else context.adapters.select(rows)
            return self._family.head(replace(context, adapters=adapters), x)

        self._flight.readouts[step.batch] = read(state, head, self._plan.logit_rows)
        state.x = None

    def _kv_read(self, step: Step) -> None:
        staging = self._state(step).staging
        assert staging is not None
        self._kv.read(step, staging)

    def _kv_write(self, step: Step) -> None:
        staging = self._state(step).staging
        assert staging is not None
        self._kv.write(step, staging)

    def _kv_up(self, step: Step) -> None:
        state = self._state(step)
        assert state.staging is not None
        self._kv.up(step, state.batch, state.staging)

    def _kv_down(self, step: Step) -> None:
        state = self._state(step)
        assert state.staging is not None
        self._kv.down(step, state.batch, state.staging)
