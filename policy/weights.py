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
_RANGE_SLACK = 3 * 136 * KIB  # what rounding to blocks and reading over small gaps may add to a unit's parts


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


def deal(units: Sequence[UnitSize], shares: Shares, *, compute: str, edges_first: bool = False) -> WeightPlacement:
    """Deal ``units`` out in ``shares``, evenly along the sweep: within one unit of them over the whole model.

    ``edges_first``: the embedding and the head go to the upper tiers before anything else; a stream of them would
    need the largest slots. ``compute``: the tier of the products.
    """
    ordered = sorted(units, key=lambda unit: not unit.edge) if edges_first else list(units)
    tiers: dict[str, str] = {}
    if edges_first:
        top = Shares(1, 0, 0) if shares.gpu else Shares(0, 1, 0) if shares.cpu else shares
        spread = Spread(shares)
        edge = Spread(top)
        for unit in ordered:
            tiers[unit.key] = edge.choose(unit.nbytes) if unit.edge else spread.choose(unit.nbytes)
    else:
        spread = Spread(shares)
        for unit in ordered:
            tiers[unit.key] = spread.choose(unit.nbytes)
    rests: dict[str, int] = defaultdict(int)
    from_disk: dict[int, int] = defaultdict(int)
    moving: dict[int, int] = defaultdict(int)
    for unit in units:
        tier = tiers[unit.key]
        rests[tier] += unit.nbytes
        for group in unit.groups:
            # A table of embeddings is looked up in row by row; only as a head is it a product's operand.
            if group == 0 and len(unit.groups) > 1:
                continue
            if tier == "disk":
                from_disk[group] += unit.nbytes + _RANGE_SLACK
            if tier != compute:
                moving[group] += unit.nbytes + _RANGE_SLACK
    return WeightPlacement(
        tiers=tiers,
        gpu=rests["gpu"],
        cpu=rests["cpu"],
        disk=rests["disk"],
        host_slot=max(from_disk.values(), default=0),
        gpu_slot=max(moving.values(), default=0) if compute == "gpu" else 0,
    )
