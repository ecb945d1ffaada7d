"""What a user may fix about how a run is carried out; ``None`` means that the plan decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flexbatch.units import Shares

Resource = Literal["gpu", "cpu", "h2d", "d2h", "disk_read", "disk_write"]
THROTTLED: tuple[Resource, ...] = ("h2d", "d2h", "disk_read", "disk_write")
Schedule = Literal["continuous", "block"]
DType = Literal["auto", "float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Placement, budgets (bytes) and schedule. Defaults are those of the command line.

    ``rates`` (bytes/s by resource) slow links and disk down: for ``sim``, and for measurements.
    """

    device: str = "auto"
    gpu_memory: int | None = None
    cpu_memory: int | None = None
    disk_memory: int | None = None
    disk_dir: Path | None = None
    weights: Shares | None = None
    kv: Shares | None = None
    hidden: Shares | None = None
    cpu_attention: bool | None = None
    weight_bits: Literal[16, 4] | None = 16
    kv_bits: Literal[16, 4] | None = 16
    micro_batch: int | None = None
    max_sequences: int | None = None
    schedule: Schedule = "continuous"
    overlap: bool = True
    dtype: DType = "auto"
    rates: Mapping[Resource, float] = field(default_factory=dict)
    adapter_memory: int | None = None
    share_prefixes: bool = True
