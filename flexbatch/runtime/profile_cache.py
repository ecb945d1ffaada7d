"""Profiles of this machine in the user's cache folder, and the fingerprint by which changed hardware is noticed.

A profile that is missing, unreadable or of other hardware is measured again; a cache that cannot be written is let be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from flexbatch.checkpoint.torchbin import cache_folder
from flexbatch.errors import FlexbatchError
from flexbatch.jobs.durable import replace_file
from flexbatch.options import Resource
from flexbatch.policy.machines import load_profile
from flexbatch.policy.profile import HardwareProfile, parse_profile
from flexbatch.runtime.device import Device
from flexbatch.runtime.hardware import cpu_model, tier_capacities, usable_cores
from flexbatch.runtime.measure import FULL, QUICK, Effort, Progress, measure
from flexbatch.units import GIB

NAMED = "FLEXBATCH_PROFILE"
_VERSION = 7  # rises when figures come to mean something else
_EFFORTS = {"full": FULL, "quick": QUICK}


def profile_machine(
    device: Device,
    folder: Path,
    *,
    rates: Mapping[Resource, float] | None = None,
    types: Collection[str] = (),
    progress: Progress | None = None,
) -> HardwareProfile:
    """Measure this machine thoroughly, about a minute, and cache the result for later runs; see ``measure``."""
    return _measured("full", device, folder, rates or {}, types, progress)


def cached_profile(
    device: Device, folder: Path, *, rates: Mapping[Resource, float] | None = None, types: Collection[str] = ()
) -> HardwareProfile | None:
    """The newest knowledge of this machine, a thorough measurement before a quick one; None where there is none.

    ``types``: product types that the compute processor's figures must include. Capacities are those of now.
    """
    prints = fingerprint(device, folder, rates or {})
    for kind in _EFFORTS:
        profile = _load(kind, prints)
        if profile is not None and set(types) <= set(profile.processor(device.compute).products):
            return replace(profile, memory=tier_capacities(device, folder))
    return None


def machine_profile(
    device: Device,
    folder: Path,
    *,
    rates: Mapping[Resource, float] | None = None,
    types: Collection[str] = (),
    progress: Progress | None = None,
) -> HardwareProfile:
    """What a run plans with: the cached profile, or a quick measurement (a few seconds), cached likewise.

    The environment variable FLEXBATCH_PROFILE names a profile, shipped or in a file, to be taken instead.
    """
    named = os.environ.get(NAMED)
    if named:
        return replace(load_profile(named), memory=tier_capacities(device, folder))
    known = cached_profile(device, folder, rates=rates, types=types)
    return known if known is not None else _measured("quick", device, folder, rates or {}, types, progress)


def fingerprint(device: Device, folder: Path, rates: Mapping[Resource, float]) -> dict[str, Any]:
    """What figures depend on: a machine with the same answers has the same figures."""
    return {
        "version": _VERSION,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / GIB, 1),
        "device": device.name,
        "gpu": device.model,
        "gpu_bytes": device.gpu_total if device.native_half else 0,
        "torch": torch.__version__,
        "disk": _disk(folder),
        "rates": {name: rates[name] for name in sorted(rates)},
    }


def _disk(folder: Path) -> str:
    """What ``folder`` lies on: the number of its device, and what is mounted there."""
    number = folder.stat().st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    with suppress(OSError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if line.split()[2] == wanted:
                return f"{wanted} {' '.join(line.partition(' - ')[2].split()[:2])}"
    return wanted


def _measured(
    kind: str,
    device: Device,
    folder: Path,
    rates: Mapping[Resource, float],
    types: Collection[str],
    progress: Progress | None,
) -> HardwareProfile:
    effort: Effort = _EFFORTS[kind]
    prints = fingerprint(device, folder, rates)
    profile = measure(device, folder, rates=rates, types=types, effort=effort, progress=progress)
    value = {"fingerprint": prints, "profile": profile.to_json()}
    data = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    path = _path(kind, prints)
    with suppress(FlexbatchError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [data], len(data))
    return profile


def _load(kind: str, prints: Mapping[str, Any]) -> HardwareProfile | None:
    path = _path(kind, prints)
    try:
        value = json.loads(path.read_bytes())
        return parse_profile(value["profile"], str(path)) if value["fingerprint"] == prints else None
    except (OSError, ValueError, KeyError, TypeError, FlexbatchError):
        return None


def _path(kind: str, prints: Mapping[str, Any]) -> Path:
    text = json.dumps(prints, sort_keys=True)
    return cache_folder() / "profiles" / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
