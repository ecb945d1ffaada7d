"""What this machine is and has free, and how fast its products are. Asked for when needed, never at import."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from pathlib import Path

import psutil
import torch

from flexbatch.kernels.linear import linear, pack
from flexbatch.runtime.device import Device

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_SHARE_OF_FREE_RAM = 0.8
_SQUARE = 1024


def default_cpu_budget() -> int:
    """80% of the RAM that this process can still take, limits of its control group honoured; bytes."""
    free = int(psutil.virtual_memory().available)
    for limit_path, usage_path in _own_cgroups():
        try:
            limit, usage = limit_path.read_text().strip(), int(usage_path.read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            free = min(free, max(0, int(limit) - usage))
    return int(_SHARE_OF_FREE_RAM * free)


def tier_capacities(device: Device, folder: Path) -> dict[str, int]:
    """Bytes of every tier: the GPU's memory, the RAM that this process may come to hold, free disk in ``folder``."""
    ram = int(psutil.virtual_memory().total)
    for limit_path, _ in _own_cgroups():
        limit = _read(str(limit_path)).strip()
        if limit.isdigit():
            ram = min(ram, int(limit))
    gpu = {"gpu": device.gpu_total} if device.compute == "gpu" else {}
    return {**gpu, "cpu": ram, "disk": shutil.disk_usage(folder).free}


def cpu_model() -> str:
    """The processor's name as it gives it."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def machine_name(device: Device) -> str:
    """What a profile of this machine is called: its processors, not its owner."""
    parts = [device.model, f"{cpu_model()}, {usable_cores()} cores"]
    return " + ".join(part for part in parts if part)


def peak_rss() -> int:
    """The most RAM this process has held so far, in bytes, as the kernel counts it."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square linear on the CPU: the median of seven, about a tenth of a second."""
    rows, weight = torch.rand(_SQUARE, _SQUARE).to(dtype), pack(torch.rand(_SQUARE, _SQUARE).to(dtype))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        linear(rows, [weight])
        seconds.append(time.perf_counter() - start)
    return 2 * _SQUARE**3 / statistics.median(seconds)


def _own_cgroups() -> list[tuple[Path, Path]]:
    """Limit and usage files of this process's control group (version 2, then 1) and of the root."""
    found: list[tuple[Path, Path]] = [(Path(limit), Path(usage)) for limit, usage in _CGROUPS]
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base = Path("/sys/fs/cgroup") / group.lstrip("/")
            found.append((base / "memory.max", base / "memory.current"))
        elif "memory" in controllers.split(","):
            base = Path("/sys/fs/cgroup/memory") / group.lstrip("/")
            found.append((base / "memory.limit_in_bytes", base / "memory.usage_in_bytes"))
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
