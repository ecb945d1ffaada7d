"""The engine: rows in, results out, in the order they finish. It joins plan, scheduler, sweeps and text.

It knows no files and no formats; jobs, the command line and the Python API stand on top of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

from flexbatch.checkpoint.four_bits import in_four_bits, open_weights
from flexbatch.checkpoint.locate import ModelFolder
from flexbatch.errors import DoesNotFitError, UsageError
from flexbatch.kernels.rotary import RotaryTable
from flexbatch.memory.direct import DirectReader
from flexbatch.memory.kv import KVMemory, PageShape
from flexbatch.memory.spill import SpillFile
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.options import EngineOptions
from flexbatch.policy.candidates import Placed
from flexbatch.policy.machine import Machine
from flexbatch.policy.plan import Plan
from flexbatch.policy.search import choose
from flexbatch.policy.weights import WeightPlacement
from flexbatch.policy.workload import Workload
from flexbatch.requests import Result, RowError, TokenizedRequest
from flexbatch.runtime.adapter_store import AdapterStore
from flexbatch.runtime.adapters import AdapterRun, Adapters, adapter_error
from flexbatch.runtime.allocator import keep_freed_blocks
from flexbatch.runtime.answers import Answers
from flexbatch.runtime.hardware import peak_rss, product_rate
from flexbatch.runtime.hidden import HiddenMoves
from flexbatch.runtime.packed_kv import PackedKV
from flexbatch.runtime.passenger import Loaded, Passenger
from flexbatch.runtime.profile_cache import machine_profile
from flexbatch.runtime.run_progress import RunProgress
from flexbatch.runtime.setup import allocate_kv, disk_folder, machine_for, open_device
from flexbatch.runtime.sweep_runner import SweepRunner
from flexbatch.runtime.trace import Trace
from flexbatch.runtime.units import unit_sizes, units_of
from flexbatch.runtime.weight_store import Progress, WeightStore
from flexbatch.scheduler.lowering import Routes
from flexbatch.scheduler.pages import PageAllocator
from flexbatch.scheduler.prefix_cache import PrefixCache
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.steps import Step
from flexbatch.shapes import ModelShape
from flexbatch.text.codec import TextCodec
from flexbatch.units import format_size


class Engine:
    """One loaded model, ready to run rows.

    Opening it plans for ``workload`` and loads the weights; ``codec`` may be None for rows of token ids. Raises
    DoesNotFitError if the plan does not fit the budgets, ModelError if the weights cannot be read, UsageError for
    options that this machine cannot follow.
    """

    def __init__(
        self,
        folder: ModelFolder,
        codec: TextCodec | None,
        options: EngineOptions,
        workload: Workload,
        progress: Progress | None = None,
        *,
        trace: bool = False,
        adapters: Mapping[str, Path] | None = None,
        delays: Callable[[Step], float] | None = None,
        passenger: Passenger | None = None,
    ) -> None:
        started = time.perf_counter()
        self._delays = delays
        self._passenger = passenger
        self._folder = folder
        self._codec = codec
        self._options = replace(options, kv_bits=_kv_bits(options, folder.shape))
        self._shape = folder.shape
        self._family = family_of(folder.shape)
        table = self._family.table(folder.shape)
        self._size = model_size(folder.shape, table)
        self._device = open_device(options)
        checkpoint = open_weights(folder, table, bits=options.weight_bits, progress=progress)
        units = units_of(table, checkpoint, folder.shape.vocab_size, whole=passenger is not None)
        self._units = unit_sizes(units)
        self._machine = machine_for(options, self._device, folder.native_dtype or folder.shape.stored_dtype)
        self._whole_machine, self._stale = self._machine, False
        if passenger is not None:
            self._machine = passenger.reserve(self._machine)
        self._profile = machine_profile(
            self._device,
            disk_folder(options),
            rates=options.rates,
            types=(self._machine.dtype,),
            progress=progress,
        )
        self._workload = workload
        self._adapters = Adapters(adapters or {}, table, folder.shape.family, self._device, options.adapter_memory)
        self._placed: Placed | None = None
        self.plan, placement = self._place(workload)
        if options.weight_bits is None:
            self._options = replace(self._options, weight_bits=4 if self.plan.weight_bits == 4 else 16)
            if self.plan.weight_bits == 4:
                checkpoint = in_four_bits(checkpoint, folder, table, progress)
                units = units_of(table, checkpoint, folder.shape.vocab_size, whole=passenger is not None)
                self._units = unit_sizes(units)
                self.plan, placement = self._place(workload)
        self._reader = DirectReader(rate=options.rates.get("disk_read"))
        self._weights = WeightStore(
            table, checkpoint, units, placement.tiers, self._device, self._reader, self.plan, progress=progress
        )
        self._placed = Placed(placement, self.plan.weight_bits, self.plan.weights_dtype)
        keep_freed_blocks(self.plan.memory[self._device.compute].working)
        self._loaded_bytes = sum(entry.nbytes for entry in {id(e): e for e in checkpoint.entries.values()}.values())
        rope = folder.shape.rope
        self._rotary = None if rope is None else RotaryTable(rope, self._device.torch_device)
        if passenger is not None:
            passenger.join(self._loaded())
        self._packing: PackedKV | None = None
        self._kv: KVMemory | None = None
        self._spill: SpillFile | None = None
        self._trace = Trace(keep=trace)
        self._progress = RunProgress()
        self._load_s = time.perf_counter() - started
        self._sweep_s: list[float] = []
        self._order_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of weights, KV cache and spill file, and end all threads."""
        self._drop_kv()
        self._reader.close()
        self._device.close()

    def run(self, requests: SequenceOf[TokenizedRequest]) -> Iterator[Result]:
        """Yield a Result for every request as it finishes.

        Rows that cannot fit the KV cache alone, or whose adapter cannot be used, are error rows.
        """
        workload = Workload.of(requests, share_prefixes=self._options.share_prefixes)
        for result in self._run(requests, workload):
            self._adapters.count(result)
            yield result

    def _run(self, requests: SequenceOf[TokenizedRequest], workload: Workload) -> Iterator[Result]:
        self.prepare(workload)
        pages = {tier: PageAllocator(count) for tier, count in self.plan.kv_pages.items()}
        adapters = self._adapters.begin(workload.adapters, pages) if workload.adapters else None
        prefixes = None
        if self._options.share_prefixes:
            prefixes = PrefixCache(pages, self.plan.page_tokens, self._progress.prefixes)
        cache = adapters.cache if adapters is not None else None
        scheduler = Scheduler(self.plan, pages, adapters=cache, prefixes=prefixes)
        answers = Answers(self._shape.eos_token_ids, self._codec, self._progress)
        yield from self._queue(scheduler, answers, requests, adapters)
        runner, store = self._runner(adapters)
        try:
            self._find_bases(runner)
            yield from self._sweeps(scheduler, runner, answers, store)
        except BaseException as error:
            self._adapters.forget()
            if self._passenger is not None:
                self._passenger.leave(error)
            raise
        finally:
            runner.close()
            page_bytes = self._page_shape(self.plan).nbytes * self._shape.num_layers
            self._progress.count_pages({tier: pool.peak for tier, pool in pages.items()}, page_bytes)
        if self._passenger is not None:
            self._passenger.leave(None)
        if adapters is not None:
            self._adapters.finish(adapters)
        for pool in pages.values():
            pool.check_idle()

    def _sweeps(
        self, scheduler: Scheduler, runner: SweepRunner, answers: Answers, store: AdapterStore | None
    ) -> Iterator[Result]:
        """Sweep until nothing is left, and yield the rows that each sweep finishes."""
        while True:
            started = time.perf_counter()
            sweep = scheduler.next_sweep()
            if sweep is None:
                return
            read = runner.run(sweep, more=scheduler.continues)
            scheduler.computed(sweep)
            self._progress.count(self._size, sweep, read)
            lost = [] if store is None else self._lost(scheduler, answers, store)
            finished = [
                piece.sequence
                for piece, readout in read
                if piece.sequence.finish_reason is None and answers.advance(scheduler, piece, readout)
            ]
            for sequence in finished:
                scheduler.retire(sequence)
            self._progress.preemptions = scheduler.preemptions
            results = [answers.result(sequence) for sequence in finished]
            self._sweep_s.append(time.perf_counter() - started)
            yield from results
            yield from lost

    def carry(self, passenger: Passenger | None) -> None:
        """Take a passenger along from now on, or none any more; the KV cache makes room for it.

        Raises DoesNotFitError if that is not enough.
        """
        whole = self._whole_machine
        machine = whole if passenger is None else passenger.reserve(whole)
        own, left = self.plan.memory[machine.compute].weights, machine.budget(machine.compute)
        if own > left:
            raise DoesNotFitError(
                f"beside {format_size(own)} of weights the {machine.compute} tier has no room for training: it lacks "
                f"{format_size(own - left)}: raise --{machine.compute}-memory",
                tier=machine.compute,
                missing=own - left,
                remedy=f"--{machine.compute}-memory",
            )
        self._drop_kv()
        self._machine, self._passenger, self._stale = machine, passenger, True
        if passenger is not None:
            passenger.join(self._loaded())

    def put_adapter(self, name: str, folder: Path) -> None:
        """Let rows of later runs name the adapter in ``folder``; one of that name before is forgotten."""
        self._adapters.put(name, folder)
        self._workload = replace(self._workload, adapters=())  # the next run plans anew, with this one's size

    def snapshot(self) -> RunProgress:
        """How far the run is."""
        return self._progress

    def stats(self) -> dict[str, Any]:
        """The contract's stats, without the counts of rows, which the job knows."""
        done = self._progress
        spilled = (0, 0) if self._spill is None else (self._spill.bytes_read, self._spill.bytes_written)
        rate = product_rate(getattr(torch, self.plan.dtype))
        flops = done.linear_flops + done.attention_flops
        generate_s = self._order_s + sum(self._sweep_s)
        return {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            "preemptions": done.preemptions,
            "shared_prompt_tokens": done.prefixes.tokens,
            "prefixes": {
                "pages_shared": done.prefixes.pages,
                "peak_pages_saved": done.prefixes.peak,
                "evictions": done.prefixes.evictions,
            },
            "load_s": self._load_s,
            "generate_s": generate_s,
            "sweeps": len(self._sweep_s),
            "sweep_s": statistics.median(self._sweep_s) if self._sweep_s else 0.0,
            "throughput_tok_s": done.completion_tokens / generate_s if generate_s else 0.0,
            "peak_bytes": {
                "gpu": self._device.gpu_peak,
                "cpu": peak_rss(),
                "disk": self._spill.nbytes if self._spill is not None else 0,
            },
            "peak_kv_bytes": dict(done.peak_kv_bytes),
            "moved_bytes": {
                "h2d": self._device.moved["h2d"],
                "d2h": self._device.moved["d2h"],
                "disk_read": self._loaded_bytes + self._reader.bytes_read + self._adapters.bytes_read + spilled[0],
                "disk_write": spilled[1],
            },
            "busy_s": dict(self._trace.busy_s),
            "step_s": dict(self._trace.kind_s),
            "flops": {"linear": done.linear_flops, "attention": done.attention_flops, "rate": rate},
            "roofline_s": flops / rate,
            "adapters": self._adapters.stats(),
            "plan": self.plan.to_json(),
        }

    def write_trace(self, path: Path) -> None:
        """Write the Chrome trace of all sweeps so far."""
        self._trace.write(path)

    @property
    def weight_bits(self) -> int:
        """Those of the weights that are loaded."""
        return self.plan.weight_bits

    def _loaded(self) -> Loaded:
        dtype: torch.dtype = getattr(torch, self.plan.dtype)
        model = (self._shape, self._family, self._weights, self._device, dtype)
        return Loaded(*model, self._routes(), self.plan, self._profile)

    # --- parts of a run ----------------------------------------------------------------------------------------

    def _place(self, workload: Workload, *, whole: bool = False) -> tuple[Plan, WeightPlacement]:
        if not workload.adapters:
            return self._place_on(self._machine, workload, whole=whole)
        sketch, _ = self._place_on(self._machine, workload, whole=whole)
        page = self._page_shape(sketch)
        machine = self._adapters.reserve(self._machine, workload.adapters, page, sketch)
        plan, placement = self._place_on(machine, workload, whole=whole)
        return self._adapters.account(plan, page), placement

    def _place_on(self, machine: Machine, workload: Workload, *, whole: bool) -> tuple[Plan, WeightPlacement]:
        return choose(
            self._folder.name,
            self._size,
            self._units,
            workload,
            self._options,
            machine,
            self._profile,
            stored_dtype=self._shape.stored_dtype,
            placed=self._placed,
            whole=whole,
        )

    def _page_shape(self, plan: Plan) -> PageShape:
        dtype = getattr(torch, plan.dtype)
        return PageShape(self._shape.num_kv_heads, plan.page_tokens, self._shape.head_dim, dtype, plan.kv_bits)

    def prepare(self, workload: Workload, *, whole: bool = False) -> None:
        """Plan for these rows; the weights stay where they are.

        Raises DoesNotFitError if they leave no room for a row; for ``whole`` if they leave none for the mean one, where
        else the longer rows fail alone.
        """
        if workload == self._workload and not self._stale:
            return
        plan, _ = self._place(workload, whole=whole)
        self._workload, self._stale = workload, False
        if _pool_of(plan) != _pool_of(self.plan):
            self._drop_kv()
        self.plan = plan

    def _drop_kv(self) -> None:
        self._kv = None
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def _routes(self) -> Routes:
        attends = self.plan.cpu_attention > 0 or self.plan.gpu_attention is not None
        return self._weights.routes(cpu_attention=attends)

    def _runner(self, adapters: AdapterRun | None) -> tuple[SweepRunner, AdapterStore | None]:
        routes = self._routes()
        page = self._page_shape(self.plan)
        if self._packing is None and self.plan.kv_bits == 4:
            self._packing = PackedKV(self._shape)
        if self._kv is None:
            self._spill, self._kv = allocate_kv(
                self.plan, page, self._shape.num_layers, routes, self._device, self._options
            )
        store = None if adapters is None else self._adapters.store(adapters, self._kv, page, page.dtype)
        hidden_base = self.plan.kv_pages.get("disk", 0) * page.nbytes * self._shape.num_layers
        runner = SweepRunner(
            shape=self._shape,
            family=self._family,
            weights=self._weights,
            kv=self._kv,
            hidden=HiddenMoves(self._device, self._spill, hidden_base),
            rotary=self._rotary,
            plan=self.plan,
            routes=routes,
            device=self._device,
            trace=self._trace,
            adapters=store,
            delays=self._delays,
            passenger=self._passenger,
            packing=self._packing if self.plan.kv_bits == 4 else None,
        )
        return runner, store

    def _find_bases(self, runner: SweepRunner) -> None:
        """Before the first packed key: see what keys look like."""
        if self._packing is None or not self._packing.observes:
            return
        started = time.perf_counter()
        runner.run(self._packing.sweep(self._codec, self._device.compute), more=True)
        self._packing.settle()
        self._load_s += time.perf_counter() - started

    def _lost(self, scheduler: Scheduler, answers: Answers, store: AdapterStore) -> list[Result]:
        """The rows of adapters that could not be read during the run."""
        results = []
        while store.failures:
            name, error = store.failures.popitem()
            for sequence in scheduler.drop(name):
                sequence.finish_reason = "error"
                results.append(answers.failed(sequence.source, adapter_error(error)))
        return results

    def _queue(
        self,
        scheduler: Scheduler,
        answers: Answers,
        requests: SequenceOf[TokenizedRequest],
        adapters: AdapterRun | None,
    ) -> Iterator[Result]:
        """Queue what has to be computed; yield at once what has not: rows that ask for nothing, or that cannot fit."""
        waiting = [Sequence.of(request, self._shape.max_positions) for request in requests]
        # Longest first: whoever starts last should end soon, or the last sweeps carry a few rows only.
        waiting.sort(key=lambda sequence: sequence.prompt_len - sequence.limit)
        accepted: list[Sequence] = []
        for sequence in waiting:
            refused = self._adapters.refusal(sequence.adapter, adapters)
            if refused is not None:
                yield answers.failed(sequence.source, refused)
            elif not sequence.wants_tokens and not (sequence.scores_prompt and sequence.prompt_len > 1):
                sequence.finish_reason = "length"
                yield answers.result(sequence)
            elif not scheduler.fits(sequence):
                tier = max(self.plan.kv_pages, key=lambda name: self.plan.kv_pages[name])
                room = self.plan.kv_pages[tier] * self.plan.page_tokens
                yield answers.failed(
                    sequence.source,
                    RowError(
                        "does_not_fit",
                        f"the row needs the KV cache of {sequence.cached_limit} tokens, the {tier} tier has room "
                        f"for {room}: raise --{tier}-memory or lower max_tokens",
                    ),
                )
            else:
                accepted.append(sequence)
        started = time.perf_counter()
        scheduler.add(accepted)
        self._order_s += time.perf_counter() - started


def _pool_of(plan: Plan) -> tuple[dict[str, int], int, int]:
    """What the pools of pages depend on."""
    return dict(plan.kv_pages), plan.page_tokens, plan.kv_bits


def _kv_bits(options: EngineOptions, shape: ModelShape) -> Literal[16, 4] | None:
    """What is asked for, as far as heads can be packed. Raises UsageError if they cannot, and have to."""
    if shape.head_dim % 2 == 0:
        return options.kv_bits
    if options.kv_bits == 4:
        raise UsageError(f"--kv-bits 4: heads of odd width (head_dim {shape.head_dim}) are not packed: use 16")
    return 16
