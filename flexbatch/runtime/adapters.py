"""The adapters of an engine: opened when rows first name them, given their share of memory, counted.

It knows folders, budgets and figures; where factors lie is the store's business, which are in use the scheduler's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexbatch.errors import AdapterError
from flexbatch.lora.adapter import Adapter
from flexbatch.lora.layout import ModuleIndex
from flexbatch.lora.modules import modules_of
from flexbatch.lora.reader import AdapterReader, open_adapters
from flexbatch.memory.kv import KVMemory, KVPool, PageShape
from flexbatch.models.spec import WeightTable
from flexbatch.policy.machine import Machine
from flexbatch.policy.plan import Plan
from flexbatch.requests import Result, RowError
from flexbatch.runtime.adapter_store import AdapterStore, FlatStore, PagedStore
from flexbatch.runtime.device import Device
from flexbatch.scheduler.adapters import AdapterCache, AdapterSize
from flexbatch.scheduler.pages import PageAllocator
from flexbatch.units import format_size

_UNIT = 64
_ARENA_SHARE = 0.25  # of the CPU tier, even if other things then have to go to disk
_POOL_SHARE = 0.25  # of the GPU tier, at most, for the pages of adapters in use


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """What one run of an engine uses: the scheduler's view of its adapters, and the pages that only they have."""

    names: frozenset[str]
    cache: AdapterCache
    own_pages: PageAllocator | None


class Adapters:
    """The adapters in ``folders``, for one base model on one device. ``budget``: bytes of the arena, or None."""

    def __init__(
        self, folders: Mapping[str, Path], table: WeightTable, family: str, device: Device, budget: int | None
    ) -> None:
        self._folders = dict(folders)
        self._reader = AdapterReader(table, family)
        self._index = ModuleIndex(modules_of(table))
        self._device = device
        self._budget = budget
        self._opened: dict[str, Adapter] = {}
        self._failed: dict[str, AdapterError] = {}
        self._sizes: dict[str, AdapterSize] = {}
        self._arena = 0
        self._reserved = 0
        self._own_pages = 0
        self._kept: tuple[AdapterCache, AdapterStore] | None = None
        self._tally: dict[str, dict[str, int]] = {}
        self._cache: AdapterCache | None = None
        self._store: AdapterStore | None = None
        self._bytes_read = 0

    def open(self, names: Iterable[str]) -> frozenset[str]:
        """Open the adapters ``names``, as far as they are not, and return those that can be used."""
        wanted = frozenset(names)
        new = wanted - self._opened.keys() - self._failed.keys()
        if new:
            opened, failed = open_adapters(self._reader, self._folders, new)
            self._opened.update(opened)
            self._failed.update(failed)
        return wanted & self._opened.keys()

    def put(self, name: str, folder: Path) -> None:
        """Add an adapter under a name, in the place of one of that name; between runs only."""
        self._folders[name] = folder
        for known in (self._opened, self._failed, self._sizes):
            known.pop(name, None)
        self._kept = None

    # --- memory --------------------------------------------------------------------------------------------------

    def reserve(self, machine: Machine, names: Iterable[str], page: PageShape, sketch: Plan) -> Machine:
        """Take the adapters' share of memory off the tiers, for a plan of everything else; see ``account``.

        ``sketch`` is a plan without adapters: they get what it leaves of RAM, or a share that it has to do without.
        """
        usable = self.open(names)
        self._size(usable, page)
        sizes = [self._sizes[name].nbytes for name in usable]
        left = sketch.memory["cpu"].budget - sketch.memory["cpu"].total
        most = max(left, int(_ARENA_SHARE * machine.cpu), max(sizes, default=0))
        self._arena = min(sum(sizes), most if self._budget is None else self._budget) // _UNIT * _UNIT
        if self._device.compute != "gpu":
            return machine.without("cpu", self._arena)
        pages = sorted((self._sizes[name].pages for name in usable), reverse=True)
        page_bytes = page.nbytes * (self._index.groups - 2)
        wanted = sum(pages[: sketch.max_sequences]) * page_bytes
        self._reserved = max(min(wanted, int(_POOL_SHARE * machine.gpu)), max(pages, default=0) * page_bytes)
        return machine.without("cpu", self._arena).without("gpu", self._reserved)

    def account(self, plan: Plan, page: PageShape) -> Plan:
        """Put what was reserved into ``plan``: the arena, and pages beside those for KV, in the same pool."""
        memory = dict(plan.memory)
        used = memory["cpu"]
        memory["cpu"] = replace(used, adapters=self._arena, budget=used.budget + self._arena)
        pages = dict(plan.kv_pages)
        if self._device.compute == "gpu":
            extra = self._reserved // (page.nbytes * (self._index.groups - 2))
            self._own_pages = 0 if "gpu" in pages else extra
            if "gpu" in pages:
                pages["gpu"] += extra
            used = memory["gpu"]
            memory["gpu"] = replace(used, adapters=self._reserved, budget=used.budget + self._reserved)
        return replace(plan, memory=memory, kv_pages=pages)

    # --- one run -------------------------------------------------------------------------------------------------

    def begin(self, names: Iterable[str], pages: Mapping[str, PageAllocator]) -> AdapterRun:
        """The scheduler's part of a run whose plan was accounted for; ``pages`` are its pools."""
        usable = self.open(names)
        if self._device.compute != "gpu":
            if self._kept is None or self._kept[0].capacity < self._arena:
                self._kept = None
                self._cache = AdapterCache(self._sizes, self._arena)
            else:
                self._cache = self._kept[0]
            self._cache.expect(usable)
            return AdapterRun(usable, self._cache, None)
        own = None if "gpu" in pages else PageAllocator(self._own_pages)
        self._cache = AdapterCache(self._sizes, self._arena, pages.get("gpu") or own)
        self._cache.expect(usable)
        return AdapterRun(usable, self._cache, own)

    def store(self, run: AdapterRun, kv: KVMemory, page: PageShape, dtype: torch.dtype) -> AdapterStore:
        """The memory of the run."""
        if self._kept is not None and self._kept[0] is run.cache:
            self._store = self._kept[1]
            return self._store
        self._store = None  # what the last run had goes before there is room for as much again
        arena = self._device.host_buffer(run.cache.capacity)
        if self._device.compute != "gpu":
            self._store = FlatStore(self._opened, self._index, run.cache, arena)
            return self._store
        layers = self._index.groups - 2
        pool = kv.pools.get("gpu") or KVPool(page, layers, self._own_pages, self._device.gpu_buffer)
        self._store = PagedStore(self._opened, self._index, run.cache, arena, pool, self._device, dtype)
        return self._store

    def finish(self, run: AdapterRun) -> None:
        """A run is over, and all its rows are done. On a CPU the arena is kept for the next one."""
        assert self._store is not None
        if self._device.compute == "gpu":
            run.cache.clear()
            if run.own_pages is not None:
                run.own_pages.check_idle()
            self._bytes_read, self._store = self._store.bytes_read, None
        else:
            run.cache.check_idle()
            self._kept = (run.cache, self._store)

    def forget(self) -> None:
        """A run was broken off: what its memory holds is not known."""
        self._kept = self._store = None

    # --- figures -------------------------------------------------------------------------------------------------

    def count(self, result: Result) -> None:
        """Count a row under its adapter."""
        if result.lora is None:
            return
        names = ("requests", "failed", "prompt_tokens", "completion_tokens")
        own = self._tally.setdefault(result.lora, dict.fromkeys(names, 0))
        own["requests"] += 1
        own["failed"] += result.error is not None
        own["prompt_tokens"] += result.prompt_tokens
        own["completion_tokens"] += result.completion_tokens

    def stats(self) -> dict[str, Any]:
        """Counts by adapter, and what they cost."""
        cache = self._cache
        figures: dict[str, Any] = {"opened": len(self._opened), "unusable": len(self._failed)}
        if cache is not None:
            figures |= {
                "arena_bytes": cache.capacity,
                "arena_peak_bytes": cache.peak,
                "arena_fragmentation": cache.fragmentation,
                "reads": cache.counts.reads,
                "uploads": cache.counts.uploads,
                "evictions": cache.counts.evictions,
                "waits": cache.counts.waits,
                "bytes_read": self.bytes_read,
            }
        return {**figures, "rows": self._tally}

    @property
    def bytes_read(self) -> int:
        """Bytes of factors read from disk, in the last run's store."""
        return self._bytes_read if self._store is None else self._store.bytes_read

    def refusal(self, name: str | None, run: AdapterRun | None) -> RowError | None:
        """Why the rows of an adapter cannot be computed, if they cannot."""
        if name is None:
            return None
        if name in self._failed:
            return adapter_error(self._failed[name])
        assert run is not None
        if run.cache.fits(name):
            return None
        size = self._sizes[name].nbytes
        return RowError(
            "does_not_fit",
            f"adapter {name} takes {format_size(size)}, there is room for {format_size(self._arena)} of adapters: "
            "raise --adapter-memory (on a GPU also --gpu-memory)",
        )

    def _size(self, names: Iterable[str], page: PageShape) -> None:
        known: dict[int, AdapterSize] = {}  # by identity: the reader shares parts among equals
        for name in names:
            if name in self._sizes and self._device.compute != "gpu":
                continue
            adapter = self._opened[name]
            size = known.get(id(adapter.parts))
            if size is None:
                size = known[id(adapter.parts)] = (
                    PagedStore.size(adapter, self._index, page.nbytes, page.dtype)
                    if self._device.compute == "gpu"
                    else FlatStore.size(adapter, self._index)
                )
            self._sizes[name] = size


def adapter_error(error: AdapterError) -> RowError:
    """The error of the rows of an adapter that cannot be used."""
    return RowError("adapter_error", str(error))
