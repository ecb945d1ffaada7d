"""From options to a machine: budgets, the device, and the memory that a plan asks for."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from flexbatch.memory.aligned import align_up
from flexbatch.memory.kv import DiskPages, KVMemory, KVPool, PageShape
from flexbatch.memory.spill import SpillFile
from flexbatch.options import EngineOptions
from flexbatch.policy.machine import LANES, Machine
from flexbatch.policy.plan import Plan
from flexbatch.runtime.cuda import pick_device
from flexbatch.runtime.device import Device
from flexbatch.runtime.hardware import default_cpu_budget
from flexbatch.scheduler.lowering import Routes
from flexbatch.units import GIB

_SIM_GPU = 4 * GIB
_DISK_SHARE = 0.9


def open_device(options: EngineOptions) -> Device:
    """The device that the options name. Raises UsageError if it is not there."""
    gpu_memory = options.gpu_memory
    if gpu_memory is None and options.device == "sim":
        gpu_memory = _SIM_GPU
    return pick_device(options.device, gpu_memory, options.rates)


def machine_for(options: EngineOptions, device: Device, stored_dtype: str) -> Machine:
    """Budgets of every tier: the options', or what is free; products on a real GPU are in the stored type."""
    cpu = options.cpu_memory if options.cpu_memory is not None else default_cpu_budget()
    disk = options.disk_memory
    if disk is None:
        disk = int(_DISK_SHARE * shutil.disk_usage(disk_folder(options)).free)
    native = stored_dtype if device.native_half else "float32"
    dtype = native if options.dtype == "auto" else options.dtype
    return Machine(device.compute, device.gpu_budget, cpu, disk, dtype)


def disk_folder(options: EngineOptions) -> Path:
    """Where spill files go."""
    return options.disk_dir if options.disk_dir is not None else Path(tempfile.gettempdir())


def allocate_kv(
    plan: Plan, page: PageShape, num_layers: int, routes: Routes, device: Device, options: EngineOptions
) -> tuple[SpillFile | None, KVMemory]:
    """Pools, lanes and the spill file that ``plan`` asks for."""
    pages = plan.kv_pages
    on_disk = pages.get("disk", 0) * page.nbytes * num_layers
    hidden_on_disk = align_up(plan.memory["disk"].hidden) + _slack(plan) if plan.hidden.disk else 0
    spill = None
    if on_disk + hidden_on_disk:
        rates = options.rates
        spill = SpillFile(
            disk_folder(options),
            on_disk + hidden_on_disk,
            read_rate=rates.get("disk_read"),
            write_rate=rates.get("disk_write"),
        )
    pools = {
        tier: KVPool(page, num_layers, pages[tier], device.gpu_buffer if tier == "gpu" else device.host_buffer)
        for tier in ("gpu", "cpu")
        if tier in pages
    }
    lane_bytes = max(plan.staged_pages.values(), default=0) * page.nbytes
    streams = not routes.cpu_attention or plan.gpu_attention is not None
    on_gpu = routes.compute == "gpu" and streams and plan.staged_pages
    return spill, KVMemory(
        shape=page,
        pools=pools,
        disk=DiskPages(page, pages["disk"], spill, 0) if "disk" in pages and spill is not None else None,
        host_lanes=[device.host_buffer(lane_bytes) for _ in range(LANES)] if "disk" in pages else [],
        gpu_lanes=[device.gpu_buffer(lane_bytes) for _ in range(LANES)] if on_gpu else [],
    )


def _slack(plan: Plan) -> int:
    """Hidden states begin at blocks, one micro-batch after the other."""
    return 4096 * (plan.prompt_tokens_per_sweep + plan.max_sequences + 2)
