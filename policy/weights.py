"""Deals weights out to tiers and counts what that takes on each: resident bytes, and rings for what streams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexbatch.policy.footprint import UnitSize
from flexbatch.scheduler.spread import Spread
from flexbatch.units import KIB, Shares

_AHEAD = 3  # mean groups that may be on their way beside the largest one, where memory allows
BLOCK = 4 * KIB  # what disks are read in


@dataclass(frozen=True, slots=True)
class WeightPlacement:
    """``tiers``: unit key -> tier. Bytes: ``gpu`` and ``cpu`` resident there, ``disk`` read every sweep.

    ``reads`` and ``uploads``: bytes by group that pass through RAM, and through the GPU, in buffers of ``host_ring``
    and ``gpu_ring`` bytes.
    """

    tiers: Mapping[str, str]
    gpu: int
    cpu: int
    disk: int
    reads: Mapping[int, int]
    uploads: Mapping[int, int]
    host_ring: int
    gpu_ring: int

    @property
    def shares(self) -> Shares:
        """The realised fractions of the stored bytes."""
        total = max(1, self.gpu + self.cpu + self.disk)
        gpu, cpu = self.gpu / total, self.cpu / total
        return Shares(gpu, cpu, max(0.0, 1 - gpu - cpu))


def least_ring(groups: Mapping[int, int]) -> int:
    """Bytes of a buffer in which every group finds room beside the one before it."""
    sizes = list(groups.values())
    if len(sizes) < 2:
        return sum(sizes)
    return max(size + following for size, following in zip(sizes, [*sizes[1:], sizes[0]], strict=True))


def grown_ring(groups: Mapping[int, int], room: int) -> int:
    """The least ring and what up to ``room`` more bytes give of those that keep transfers well ahead of their use."""
    sizes = list(groups.values())
    if not sizes:
        return 0
    wanted = min(sum(sizes), 2 * max(sizes) + _AHEAD * sum(sizes) // len(sizes))
    least = least_ring(groups)
    return least + max(0, min(wanted - least, room)) // BLOCK * BLOCK


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
                from_disk[group] += unit.buffer_bytes
            if tier != compute:
                moving[group] += unit.buffer_bytes
    # Whole blocks, so that every place in a ring starts at one.
    reads = {group: -(-from_disk[group] // BLOCK) * BLOCK for group in sorted(from_disk)}
    uploads = {group: -(-moving[group] // BLOCK) * BLOCK for group in sorted(moving)} if compute == "gpu" else {}
    return WeightPlacement(
        tiers=tiers,
        gpu=rests["gpu"],
        cpu=rests["cpu"],
        disk=rests["disk"],
        reads=reads,
        uploads=uploads,
        host_ring=least_ring(reads),
        gpu_ring=least_ring(uploads),
    )
