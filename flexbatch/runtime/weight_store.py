"""Where a model's weights rest and how a group's come to where products run: resident, from RAM, or from disk.

It carries out ``read``, ``upload`` and ``gather`` Steps; when they happen is the lowering's decision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from flexbatch.checkpoint.tensors import DTYPES, Checkpoint, TensorEntry
from flexbatch.kernels.linear import Weight, pack
from flexbatch.memory.aligned import align_up
from flexbatch.memory.direct import DirectReader, Extent, ReadPlan, plan_reads
from flexbatch.memory.weights import GroupWeights, Operand
from flexbatch.models.spec import GroupSpec, LinearSpec, WeightTable
from flexbatch.policy.machine import LANES
from flexbatch.runtime.device import Device
from flexbatch.runtime.units import Unit
from flexbatch.scheduler.lowering import Routes
from flexbatch.scheduler.steps import Resource, Step

Progress = Callable[[str, int, int], None]


class Streamed(Protocol):
    """What a plan, of generation or of training, says of weights on their way; rings in bytes."""

    @property
    def dtype(self) -> str:
        """The type of products."""

    @property
    def weights_dtype(self) -> str:
        """The type that weights in memory are held in."""

    @property
    def host_ring(self) -> int:
        """Of what disk reads go to."""

    @property
    def gpu_ring(self) -> int:
        """Of what uploads go to."""


class WeightStore:
    """The weights of one model, placed by ``tiers`` (unit key -> tier).

    On a device without a GPU tier, units in RAM are widened to the plan's ``weights_dtype``; all others, and weights in
    4 bits anywhere, stay as stored until a product reads them. Small tensors are in ``dtype``, where products run.
    ``blocked``: matrices may rest in a layout that only products by their transpose read.
    """

    def __init__(
        self,
        table: WeightTable,
        checkpoint: Checkpoint,
        units: Sequence[Unit],
        tiers: Mapping[str, str],
        device: Device,
        reader: DirectReader,
        plan: Streamed,
        *,
        progress: Progress | None = None,
        blocked: bool = True,
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._reader = reader
        self._plan = plan
        self._layers = len(table.layers)
        self._held: torch.dtype = getattr(torch, plan.weights_dtype)
        self._compute: torch.dtype = getattr(torch, plan.dtype)
        self._blocked = blocked
        self._on_gpu = device.compute == "gpu"
        self._resident: list[GroupWeights] = []
        keys = Counter(unit.key for unit in units)
        self._shared = {key for key, count in keys.items() if count > 1}
        self._tables: dict[str, Tensor] = {}
        units = [_grounded(unit, checkpoint, tiers) for unit in units]
        streamed = [unit for unit in units if not self._rests_at_compute(tiers[unit.key])]
        self._table = next((unit for unit in streamed if unit.is_table), None)
        self._table_tier = tiers[self._table.key] if self._table is not None else None
        moving = [unit for unit in streamed if not unit.is_table]
        resident = {(unit.group, unit.name) for unit in units} - {(unit.group, unit.name) for unit in streamed}
        # Linears that come in whole or in part: their units in order, and the parts of those that need not come.
        self._moving: dict[int, dict[str, list[Unit]]] = {}
        self._resting_parts: dict[str, tuple[Weight, ...]] = {}
        for unit in units:
            if unit.is_table or (unit.group, unit.name) in resident:
                continue
            self._moving.setdefault(unit.group, {}).setdefault(unit.name, []).append(unit)
            if self._rests_at_compute(tiers[unit.key]):
                parts = (self._resting(entry, transposed=unit.transposed) for entry in unit.entries)
                self._resting_parts[unit.key] = tuple(parts)
        for index, group in enumerate(table.groups):
            self._resident.append(self._load_resident(index, group, resident))
            if progress is not None:
                progress("loading weights", index + 1, len(table.groups))
        self._streams = {
            group: _Stream([unit for unit in moving if unit.group == group], tiers)
            for group in sorted({unit.group for unit in moving})
        }
        self._host_table: Tensor | None = None
        if self._table is not None and self._table_tier == "cpu":
            entry = self._table.entries[0]
            self._host_table = _dense(entry.view(self._in_host(entry)))
        for stream in self._streams.values():
            if stream.from_host:
                stream.host_parts = {
                    unit.key: tuple(self._in_host(entry) for entry in unit.entries) for unit in stream.from_host
                }
        nothing = torch.empty(0, dtype=torch.uint8)
        self._host_ring = device.host_buffer(plan.host_ring) if self.reads else nothing
        self._gpu_ring = device.gpu_buffer(plan.gpu_ring) if self.uploads else nothing
        # By group and unit the bytes of each part: what has come to the compute tier, and from disk to the host ring.
        self._ready: dict[int, dict[str, tuple[Tensor, ...]]] = {}
        self._arrived: dict[int, dict[str, tuple[Tensor, ...]]] = {}

    @property
    def reads(self) -> dict[int, int]:
        """Bytes of the host ring that each group with weights on disk takes."""
        return {group: stream.plan.nbytes for group, stream in self._streams.items() if stream.plan.nbytes}

    @property
    def uploads(self) -> dict[int, int]:
        """Bytes of the GPU ring that each group with weights below the GPU takes."""
        return {group: stream.packed_bytes for group, stream in self._streams.items()} if self._on_gpu else {}

    @property
    def gather_on(self) -> Resource | None:
        """What fetches rows of the token embedding; None if the table rests where products run.

        From disk, too, it is the CPU: in the line of disk reads the rows, which a sweep needs first, would wait for
        whole layers that were asked for before the tokens were known.
        """
        return None if self._table_tier is None else "cpu"

    def routes(self, *, cpu_attention: bool = False) -> Routes:
        """Which way weights and rows go in a sweep."""
        return Routes(
            num_layers=self._layers,
            compute=self._device.compute,
            reads=self.reads,
            uploads=self.uploads,
            host_ring=self._plan.host_ring,
            gpu_ring=self._plan.gpu_ring,
            gather=self.gather_on,
            cpu_attention=cpu_attention,
            lanes=LANES,
        )

    def read(self, step: Step) -> None:
        """Bring a group's weights from disk to byte ``step.slot`` of the host ring."""
        stream = self._streams[step.group]
        place = self._host_ring[step.slot : step.slot + stream.plan.nbytes]
        self._reader.read(stream.plan, place)
        self._arrived[step.group] = stream.parts_in(place)
        if not self._on_gpu:
            self._ready[step.group] = self._arrived[step.group]

    def upload(self, step: Step) -> None:
        """Bring a group's weights from RAM to byte ``step.slot`` of the GPU ring."""
        stream = self._streams[step.group]
        sources = {**stream.host_parts, **self._arrived.get(step.group, {})}
        targets: dict[str, tuple[Tensor, ...]] = {}
        position = step.slot
        for key, parts in sources.items():
            placed = []
            for part in parts:
                target = self._gpu_ring[position : position + part.nbytes]
                self._device.copy(target, part, "h2d")
                placed.append(target)
                position += align_up(part.nbytes)
            targets[key] = tuple(placed)
        self._ready[step.group] = targets

    def gather(self, ids: Tensor) -> Tensor:
        """int64 [T] -> rows of the token embedding [T, width], as stored, in RAM."""
        assert self._table is not None
        entry = self._table.entries[0]
        if self._host_table is not None:
            return self._host_table.index_select(0, ids)
        assert entry.path is not None
        dtype = DTYPES[entry.dtype]
        raw = self._reader.read_rows(entry.path, entry.offset, entry.shape[1] * dtype.itemsize, ids.tolist())
        return raw.view(dtype)

    def group(self, index: int) -> GroupWeights:
        """The weights of a group where products run; its transfers have happened."""
        resident = self._resident[index]
        stream = self._streams.get(index)
        if stream is None:
            return resident
        ready = self._ready[index]
        linears = dict(resident.linears)
        for name, units in self._moving[index].items():
            parts: list[Weight] = []
            for unit in units:
                parts += self._resting_parts.get(unit.key) or _operands(unit, ready[unit.key])
            linears[name] = Operand(tuple(parts), resident.linears[name].bias)
        return GroupWeights(resident.dtype, linears, resident.vectors, resident.tables)

    # --- loading -------------------------------------------------------------------------------------------------

    def _rests_at_compute(self, tier: str) -> bool:
        return tier == self._device.compute

    def _load_resident(self, index: int, group: GroupSpec, resident: set[tuple[int, str]]) -> GroupWeights:
        weights = GroupWeights(dtype=self._compute)
        for linear in group.linears:
            parts: tuple[Weight, ...] = ()
            if (index, linear.name) in resident:
                parts = self._operand(group, linear)
            weights.linears[linear.name] = Operand(parts, self._bias(group, linear))
        for vector in group.vectors:
            name = group.prefix + vector.tensor
            if (index, vector.name) in resident:
                weights.tables[vector.name] = self._matrix(name)
            elif len(vector.shape) == 1:
                weights.vectors[vector.name] = self._placed(self._read(name).to(self._compute))
            elif self._table is None or self._table.name != vector.name:
                weights.tables[vector.name] = self._placed(self._read(name))
        return weights

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._checkpoint.entries[name])

    def _placed(self, tensor: Tensor) -> Tensor:
        """The same values where products run."""
        if not self._on_gpu:
            return tensor
        raw = self._device.gpu_buffer(tensor.nbytes)
        target = raw.view(tensor.dtype).view(tensor.shape)
        self._device.copy(target, tensor.contiguous(), "h2d")
        return target

    def _rest(self, tensor: Tensor) -> Tensor:
        """A resident matrix: on the GPU as stored, in RAM in the type it is held in."""
        if self._on_gpu:
            return self._placed(tensor)
        if tensor.dtype == self._held:
            return tensor  # a second copy, even for a moment, may be what memory has no room for
        held = self._in_ram(tuple(tensor.shape), self._held)
        return held.copy_(tensor)

    def _in_ram(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._device.host_buffer(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def _matrix(self, name: str) -> Tensor:
        """A matrix that stands alone: an embedding, or a head, which may be the same stored tensor."""
        stored = self._checkpoint.entries[name].name
        if stored not in self._shared:
            return self._rest(self._read(name))
        if stored not in self._tables:
            self._tables[stored] = self._rest(self._read(name))
        return self._tables[stored]

    def _stacked(self, group: GroupSpec, linear: LinearSpec) -> Tensor:
        names = [f"{group.prefix}{part.module}.weight" for part in linear.parts]
        if len(names) == 1 and not linear.transposed:
            return self._matrix(names[0])
        dtype = DTYPES[self._checkpoint.entries[names[0]].dtype] if self._on_gpu else self._held
        shape = (linear.out_features, linear.in_features)
        stacked = torch.empty(shape, dtype=dtype) if self._on_gpu else self._in_ram(shape, dtype)
        row = 0
        for name, part in zip(names, linear.parts, strict=True):
            stored = self._read(name)
            stacked[row : row + part.out_features] = stored.t() if linear.transposed else stored
            row += part.out_features
        return self._placed(stacked) if self._on_gpu else stacked

    def _operand(self, group: GroupSpec, linear: LinearSpec) -> tuple[Weight, ...]:
        """A resident linear in the form its products read; a table of embeddings that is also a head stays a table."""
        entries = [self._checkpoint.entries[f"{group.prefix}{part.module}.weight"] for part in linear.parts]
        if any(entry.layout is not None for entry in entries):
            return tuple(self._resting(entry, transposed=linear.transposed) for entry in entries)
        stacked = self._stacked(group, linear)
        shared = any(stacked is table for table in self._tables.values())
        return (stacked if shared or self._on_gpu or not self._blocked else pack(stacked),)

    def _resting(self, entry: TensorEntry, *, transposed: bool) -> Weight:
        """One part of a resident linear of which some are in 4 bits."""
        if entry.layout is None:
            stored = self._checkpoint.read(entry)
            return self._rest(stored.t().contiguous() if transposed else stored)
        raw = self._in_host(entry) if not self._on_gpu else self._placed(self._checkpoint.raw(entry))
        return entry.view(raw)

    def _bias(self, group: GroupSpec, linear: LinearSpec) -> Tensor | None:
        if not linear.bias:
            return None
        parts = [self._read(f"{group.prefix}{part.module}.bias").to(self._compute) for part in linear.parts]
        return self._placed(torch.cat(parts))

    def _in_host(self, entry: TensorEntry) -> Tensor:
        """The bytes of a tensor that rests in RAM as stored, in memory that copies to the GPU reach directly."""
        raw = self._device.host_buffer(entry.nbytes)
        raw.copy_(self._checkpoint.raw(entry))
        return raw


class _Stream:
    """The units of one group that travel every sweep, and how those on disk are read."""

    def __init__(self, units: Sequence[Unit], tiers: Mapping[str, str]) -> None:
        self.units = tuple(units)
        self.from_disk = [unit for unit in units if tiers[unit.key] == "disk"]
        self.from_host = [unit for unit in units if tiers[unit.key] == "cpu"]
        self.host_parts: dict[str, tuple[Tensor, ...]] = {}
        self.plan: ReadPlan = plan_reads([_extent(entry) for unit in self.from_disk for entry in unit.entries])

    @property
    def packed_bytes(self) -> int:
        """Bytes of the GPU ring that hold all units."""
        return sum(align_up(entry.nbytes) for unit in self.units for entry in unit.entries)

    def parts_in(self, place: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """The bytes of the parts of the units from disk, as views of the place they were read into."""
        found: dict[str, tuple[Tensor, ...]] = {}
        index = 0
        for unit in self.from_disk:
            parts = []
            for entry in unit.entries:
                raw = self.plan.view(place, index)
                if self.plan.offsets[index] % entry.alignment:
                    raw = raw.clone()  # a checkpoint whose tensors do not even lie at whole elements
                parts.append(raw)
                index += 1
            found[unit.key] = tuple(parts)
        return found


def _grounded(unit: Unit, checkpoint: Checkpoint, tiers: Mapping[str, str]) -> Unit:
    """A unit that rests on disk, its entries such as lie in files; any other as it is."""
    if tiers[unit.key] != "disk" or all(entry.path is not None for entry in unit.entries):
        return unit
    return replace(unit, entries=tuple(checkpoint.at_rest(entry) for entry in unit.entries))


def _operands(unit: Unit, raws: Sequence[Tensor]) -> list[Weight]:
    """The parts of a unit [out, in], as views of their bytes."""
    parts = [entry.view(raw) for entry, raw in zip(unit.entries, raws, strict=True)]
    return [part.t() if unit.transposed and isinstance(part, Tensor) else part for part in parts]


def _dense(part: Weight) -> Tensor:
    """``part``, which is not in 4 bits."""
    assert isinstance(part, Tensor)
    return part


def _extent(entry: TensorEntry) -> Extent:
    assert entry.path is not None, f"{entry.name} rests on disk and lies in no file"
    return Extent(entry.path, entry.offset, entry.nbytes)
