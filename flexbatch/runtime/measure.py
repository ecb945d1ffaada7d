"""Measures a machine's profile through the code that runs use: thoroughly in about a minute, or quickly for a run.

It decides which figures are worth how much time and puts them together; how each is taken stands in the probes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexbatch.errors import FlexbatchError
from flexbatch.options import Resource
from flexbatch.policy.profile import Curve, HardwareProfile, Processor
from flexbatch.runtime.allocator import keep_freed_blocks
from flexbatch.runtime.device import Device
from flexbatch.runtime.hardware import default_cpu_budget, machine_name, tier_capacities
from flexbatch.runtime.probes import Probe, Sizes, copies, disk
from flexbatch.runtime.processor_probes import (
    Bench,
    attention,
    elementwise,
    packed_attention,
    products,
    short_attention,
    steps,
    widening,
)
from flexbatch.runtime.steady import Clock, Estimate, Patience, steady
from flexbatch.units import GIB, MIB

Progress = Callable[[str, int, int], None]
STAGE = "measuring this machine"
_ASSUMED_DISK = 100e6
_ASSUMED = "assumed: the disk folder has no room, or cannot be written, to measure it"


@dataclass(frozen=True, slots=True)
class Effort:
    """How thorough a measurement is.

    ``rows`` and ``types`` are those of products; ``other_rows`` those of types that a run computes in only when told
    to. Patience for disk, for everything else, and buffers: ``pool`` bytes of weights or pages, ``file`` on disk.
    """

    rows: Sequence[int]
    other_rows: Sequence[int]
    types: Collection[str]
    patience: Patience
    disk: Patience
    pool: int
    file: int
    piece: int
    may_assume: bool


FULL = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 512, 1024, 2048),
    other_rows=(1, 16, 128, 512, 2048),
    types=("float32", "float16", "bfloat16"),
    patience=Patience(0.01, 7, 1.3),
    disk=Patience(0.02, 9, 6.0),
    pool=512 * MIB,
    file=2 * GIB,
    piece=128 * MIB,
    may_assume=False,
)
QUICK = Effort(
    rows=(1, 16, 64, 256, 1024),
    other_rows=(1, 64, 512),
    types=(),
    patience=Patience(0.03, 3, 0.15),
    disk=Patience(0.05, 3, 0.4),
    pool=128 * MIB,
    file=256 * MIB,
    piece=32 * MIB,
    may_assume=True,
)


def measure(
    device: Device,
    folder: Path,
    *,
    rates: Mapping[Resource, float] | None = None,
    types: Collection[str] = (),
    effort: Effort = FULL,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> HardwareProfile:
    """Measure ``device``, the processor and the disk below ``folder``, which ``rates`` (bytes/s) may slow down.

    ``types`` are product types that are wanted beside those of ``effort`` and the device's own. Takes at most a
    quarter of the RAM and of the GPU tier that are free, and as much disk as ``effort`` says, all given back. Raises
    DoesNotFitError or UsageError if the disk cannot be measured, unless ``effort`` may assume a figure instead.
    """
    probes = _probes(device, folder, rates or {}, types, effort)
    total = sum(len(probe.figures) for probe in probes)
    found: dict[str, Estimate] = {}
    done = 0
    keep_freed_blocks()
    with torch.inference_mode():
        for probe in probes:
            patience = effort.disk if probe.figures[0].startswith("links.disk") else effort.patience
            try:
                for place, sample in enumerate(probe.samplers()):
                    found[probe.figures[place]] = steady(sample, patience, clock)
                    del sample  # it holds on to what the probe has allocated
                    _tell(progress, done + place + 1, total)
            except FlexbatchError:
                if not (effort.may_assume and probe.figures[0].startswith("links.disk")):
                    raise
            done += len(probe.figures)
            _tell(progress, done, total)
    return _profile(device, folder, found)


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(STAGE, done, total)


def _probes(
    device: Device, folder: Path, rates: Mapping[Resource, float], types: Collection[str], effort: Effort
) -> list[Probe]:
    room = default_cpu_budget() // 8  # some probes take it twice
    sizes = Sizes(room, effort.file, effort.piece)
    found = [disk(folder, sizes, rates.get("disk_read"), rates.get("disk_write"))]
    own = "float16" if device.native_half else "float32"
    if device.compute == "gpu":
        found.append(copies(device, sizes))
        bench = Bench(device, "gpu", min(effort.pool, device.gpu_budget // 8), slowest=effort.patience.seconds)
        found += _processor(bench, own, {own, *effort.types, *types}, effort)
    if not _shared(device):
        bench = Bench(device, "cpu", min(effort.pool, room), slowest=effort.patience.seconds)
        wanted = {"float32", *effort.types, *(() if device.compute == "gpu" else types)}
        found += _processor(bench, own, wanted, effort)
    return found


def _shared(device: Device) -> bool:
    """Whether the GPU is played by the CPU, so that one measurement does for both."""
    return device.compute == "gpu" and device.torch_device.type == "cpu"


def _processor(bench: Bench, own: str, types: Collection[str], effort: Effort) -> list[Probe]:
    """``own``: the type that runs compute and keep KV in unless told otherwise."""
    order = sorted(types, key=lambda name: (name != own, name))
    probes = [
        products(bench, getattr(torch, name), effort.rows if name in (own, "float32") else effort.other_rows)
        for name in order
    ]
    if bench.tier == "cpu":
        probes.append(products(bench, torch.float32, effort.rows, loose=True))
    probes += [widening(bench, stored) for stored in (torch.float16, torch.bfloat16, None)]
    probes.append(elementwise(bench, getattr(torch, own)))
    probes.append(attention(bench, getattr(torch, own)))
    probes.append(packed_attention(bench, getattr(torch, own)))
    probes.append(short_attention(bench, getattr(torch, own)))
    probes.append(steps(bench, getattr(torch, own)))
    return probes


def _profile(device: Device, folder: Path, found: Mapping[str, Estimate]) -> HardwareProfile:
    gpu = _assemble("gpu", found) if device.compute == "gpu" else None
    cpu = gpu if _shared(device) and gpu is not None else _assemble("cpu", found)
    when = time.strftime("%Y-%m-%d")
    groups: dict[str, list[Estimate]] = defaultdict(list)
    for name, estimate in found.items():
        groups[_curve(name)].append(estimate)
    sources = {name: f"measured {when}: {_quality(estimates)}" for name, estimates in groups.items()}
    if _shared(device):
        sources |= {name.replace("gpu.", "cpu.", 1): text for name, text in sources.items() if name.startswith("gpu.")}
    memory = tier_capacities(device, folder)
    sources |= {f"memory.{tier}": f"reported by the system {when}" for tier in memory}
    links = {name.removeprefix("links."): found[name].value for name in found if name.startswith("links.")}
    for link in ("disk_read", "disk_write"):
        if link not in links:
            links[link] = _ASSUMED_DISK
            sources[f"links.{link}"] = _ASSUMED
    return HardwareProfile(machine_name(device), memory, links, cpu, gpu, sources)


def _quality(estimates: Sequence[Estimate]) -> str:
    spread = max(estimate.spread for estimate in estimates)
    count = min(estimate.count for estimate in estimates)
    return (
        f"median of {count} or more, known to {100 * spread:.1f}%" if count > 1 else "one sample for its slowest point"
    )


def _assemble(tier: str, found: Mapping[str, Estimate]) -> Processor:
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    widened: dict[str, float] = {}
    loose: list[tuple[int, float]] = []
    for name, estimate in found.items():
        where, kind, *rest = name.split(".")
        if where == tier and kind == "products":
            curves[rest[0]].append((int(rest[1]), estimate.value))
        elif where == tier and kind == "widened":
            widened[rest[0]] = estimate.value
        elif where == tier and kind == "loose":
            loose.append((int(rest[0]), estimate.value))
    return Processor(
        products={dtype: Curve(tuple(points)) for dtype, points in curves.items()},
        widened=widened,
        attention_bytes=found[f"{tier}.attention_bytes"].value,
        attention_flops=found[f"{tier}.attention_flops"].value,
        loose=Curve(tuple(loose)) if loose else None,
        step_s=1 / found[f"{tier}.step_s"].value,
        attend_s=1 / found[f"{tier}.attend_s"].value,
        elementwise=found[f"{tier}.elementwise"].value,
        packed_attention=found[f"{tier}.packed_attention"].value,
        packing=found[f"{tier}.packing"].value,
    )


def _curve(name: str) -> str:
    """The dotted name of the figure in the profile: points of one curve share theirs."""
    parts = name.split(".")
    return ".".join(parts[:3] if parts[1] == "products" else parts[:2] if parts[1] == "loose" else parts)
