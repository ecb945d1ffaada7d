"""Profiles of machines that people have, by name or in files, and what a plan may use of such a machine.

Knows no figures; reads and checks JSON.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from flexbatch.errors import UsageError
from flexbatch.options import EngineOptions
from flexbatch.policy.machine import Machine
from flexbatch.policy.profile import HardwareProfile, parse_profile

SHARES = {"gpu": 0.9, "cpu": 0.8, "disk": 0.9}
"""Of a tier's memory, what a plan takes unless it is told otherwise."""
_LARGEST = 2**22  # bytes; a profile has a few thousand


def shipped_profiles() -> tuple[str, ...]:
    """The names of the profiles inside the package."""
    found = (Path(entry.name) for entry in _folder().iterdir())
    return tuple(sorted(path.stem for path in found if path.suffix == ".json"))


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """Return the profile of a shipped name, or of a JSON file such as ``flexbatch profile`` writes.

    Raises UsageError, in one line, if it is neither, or if the file is not a valid profile.
    """
    name = str(name_or_path)
    if name.lower() in shipped_profiles():
        return parse_profile(json.loads((_folder() / f"{name.lower()}.json").read_bytes()), f"{name.lower()} (shipped)")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(
            f"--profile {name}: neither a file nor a shipped machine: give a file that flexbatch profile --output "
            f"wrote, or one of {', '.join(shipped_profiles())}"
        )
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"--profile {name}: larger than any profile: give one that flexbatch profile wrote")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--profile {name}: cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--profile {name}: not valid JSON ({error}): write it with flexbatch profile") from None
    return parse_profile(value, name)


def machine_of(profile: HardwareProfile, options: EngineOptions, stored_dtype: str) -> Machine:
    """The machine that ``profile`` describes as a plan may use it: budgets are the options', or the default shares.

    ``auto`` is its GPU where it has one. Raises UsageError if ``options`` ask for a GPU that it has not, or for a type
    that its figures lack.
    """
    device = options.device
    if profile.gpu is None and device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: the profile {profile.name} has no GPU: use --device cpu")
    compute = "gpu" if profile.gpu is not None and device != "cpu" else "cpu"
    known = profile.processor(compute).products
    native = stored_dtype if compute == "gpu" and device != "sim" else "float32"
    if native not in known:  # bfloat16 on a GPU without it
        native = "float16" if "float16" in known and compute == "gpu" else "float32"
    dtype = native if options.dtype == "auto" else options.dtype
    if dtype not in known:
        raise UsageError(
            f"--dtype {dtype}: the profile {profile.name} has no products in it: its {compute} has {', '.join(known)}"
        )

    def budget(tier: str, asked: int | None) -> int:
        return int(SHARES[tier] * profile.memory.get(tier, 0)) if asked is None else asked

    return Machine(
        compute=compute,
        gpu=budget("gpu", options.gpu_memory) if compute == "gpu" else 0,
        cpu=budget("cpu", options.cpu_memory),
        disk=budget("disk", options.disk_memory),
        dtype=dtype,
    )


def profile_text(profile: HardwareProfile) -> str:
    """A profile as JSON that people can read and edit: each point of a curve on a line of its own."""
    text = json.dumps(profile.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\s+(\d+),\s+([^\s\]]+)\s+\]", r"[\1, \2]", text) + "\n"


def _folder() -> Traversable:
    return files("flexbatch") / "assets" / "profiles"
