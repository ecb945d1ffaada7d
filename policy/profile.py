"""A machine in figures: capacities, bandwidths and product rates, each with its source. Data; it measures nothing.

The same JSON is written by a measurement of this machine and shipped, from data sheets, for machines that people have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from flexbatch.errors import UsageError


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate over a number of rows: ``points`` are (rows, rate), rows rising. Constant beyond its ends."""

    points: tuple[tuple[int, float], ...]

    def at(self, rows: float) -> float:
        """The rate at ``rows``, between two points linear in the logarithms."""
        if rows <= self.points[0][0]:
            return self.points[0][1]
        for (low, slow), (high, fast) in zip(self.points, self.points[1:], strict=False):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return math.exp((1 - share) * math.log(slow) + share * math.log(fast))
        return self.points[-1][1]


@dataclass(frozen=True, slots=True)
class Processor:
    """What one processor does a second.

    ``products``: dtype name -> FLOP/s of a linear over the rows of its activations, operands in that dtype and at
    hand. ``widened``: stored dtype -> weights/s that are brought to the compute type before they are used (16 bit to
    fp32 on a CPU; 4 bit: ``int4``). ``attention_bytes``: KV bytes/s that attention of decoding rows reads;
    ``attention_flops``: FLOP/s of attention of prompt tokens. ``step_s``: seconds that any Step takes at least.
    """

    products: Mapping[str, Curve]
    widened: Mapping[str, float]
    attention_bytes: float
    attention_flops: float
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One machine. ``memory``: bytes of every tier it has; ``links``: bytes/s of h2d, d2h, disk_read, disk_write.

    ``gpu`` is None on a machine without one, which has neither a ``gpu`` tier nor the first two links. ``sources`` says
    where figures come from, by their dotted name.
    """

    name: str
    memory: Mapping[str, int]
    links: Mapping[str, float]
    cpu: Processor
    gpu: Processor | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def processor(self, tier: str) -> Processor:
        """The processor of ``tier``, ``gpu`` or ``cpu``."""
        found = self.gpu if tier == "gpu" else self.cpu
        if found is None:
            raise UsageError(f"the hardware profile {self.name} has no GPU: use --device cpu")
        return found
