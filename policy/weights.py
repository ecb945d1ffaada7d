"""Deals weights out to tiers and counts what that takes on each: resident bytes and the slots that streams need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexbatch.policy.footprint import UnitSize
from flexbatch.scheduler.spread import Spread
from flexbatch.units import KIB, Shares

HOST_SLOTS = 2
GPU_SLOTS = 2
RANGE_SLACK = 3 * 136 * KIB  # what rounding to blocks and reading over small gaps may add to a unit's parts


@dataclass(frozen=True, slots=True)
class WeightPlacement:
    """``tiers``: unit key -> tier. Bytes: ``gpu`` and ``cpu`` resident there, ``disk`` read every sweep; slots."""

    tiers: Mapping[str, str]
    gpu: int
    cpu: int
    disk: int
    host_slot: int
    gpu_slot: int

    @property
    def shares(self) -> Shares:
        """The realised fractions of the stored bytes."""
        total = max(1, self.gpu + self.cpu + self.disk)
        gpu, cpu = self.gpu / total, self.cpu / total
        return Shares(gpu, cpu, max(0.0, 1 - gpu - cpu))


def deal(units: Sequence[UnitSize], shares: Shares, *, compute: str, edges: str | None = None) -> WeightPlacement:
    """Deal ``units`` out in ``shares``, evenly along the sweep: within one unit of them over the whole model.

    ``edges``: the tier of the embedding and the head, if ``shares`` are those of the layers only. ``compute``: the
    tier of the products.
    """
    spread = Spread(shares)
    tiers = {unit.key: edges if unit.edge and edges is not None else spread.choose(unit.nbytes) for unit in units}
    rests: dict[str, int] = defaultdict(int)
    from_disk: dict[int, int] = defaultdict(int)
    moving: dict[int, int] = defaultdict(int)
    for unit in units:
        tier = tiers[unit.key]
        rests[tier] += unit.nbytes
        for group in unit.groups:
            # A table of embeddings is looked up in row by row; only as a head is it a product's operand.
            if group == 0 and unit.table:
                continue
            if tier == "disk":
                from_disk[group] += unit.nbytes + RANGE_SLACK
            if tier != compute:
                moving[group] += unit.nbytes + RANGE_SLACK
    return WeightPlacement(
        tiers=tiers,
        gpu=rests["gpu"],
        cpu=rests["cpu"],
        disk=rests["disk"],
        host_slot=max(from_disk.values(), default=0),
        gpu_slot=max(moving.values(), default=0) if compute == "gpu" else 0,
    )
