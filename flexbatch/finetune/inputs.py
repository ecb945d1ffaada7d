"""The inputs of layers, kept until backward: on the tier of the products, in RAM below it, or on disk.

Carries out the ``input_*`` Steps. Buffers of transfers are reused by lane, as the lowering's dependencies allow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.memory.aligned import align_up
from flexbatch.memory.spill import SpillFile
from flexbatch.runtime.device import Device
from flexbatch.scheduler.steps import Resource, Step


class SavedInputs:
    """Hidden states [T, hidden] in ``dtype`` by (group, micro-batch); ``tiers``: group -> where they rest.

    Buffers live for one pass: ``begin`` makes room on disk, ``end`` lets go of all.
    """

    def __init__(
        self, device: Device, tiers: Mapping[int, str], dtype: torch.dtype, hidden: int, lanes: int, folder: Path,
        rates: Mapping[Resource, float],
    ) -> None:  # fmt: skip
        self._device = device
        self._tiers = tiers
        self._dtype = dtype
        self._hidden = hidden
        self._lanes = lanes
        self._folder = folder
        self._rates = rates
        self._on_gpu = device.compute == "gpu"
        self._spill: SpillFile | None = None
        self._offsets: dict[tuple[int, int], int] = {}
        self._tokens: Sequence[int] = ()
        self._saving = False
        self._here: dict[tuple[int, int], Tensor] = {}  # where products run
        self._below: dict[tuple[int, int], Tensor] = {}  # raw bytes in RAM
        self._lane_buffers: dict[tuple[str, int], Tensor] = {}
        self._leaving: deque[Tensor] = deque()
        self._forwards = self._released = 0
        self._held = 0
        self._changes: deque[int] = deque()  # of the bytes held, from any thread, not counted yet
        self._read = self._written = 0

    @property
    def bytes_read(self) -> int:
        """Bytes that came back from disk."""
        return self._read + (0 if self._spill is None else self._spill.bytes_read)

    @property
    def bytes_written(self) -> int:
        """Bytes that went to disk."""
        return self._written + (0 if self._spill is None else self._spill.bytes_written)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the spill file."""
        return 0 if self._spill is None else self._spill.nbytes

    def highest(self) -> int:
        """The most bytes of buffers there were since this was asked last; only one thread asks."""
        highest = self._held
        while self._changes:
            self._held += self._changes.popleft()
            highest = max(highest, self._held)
        return highest

    def begin(self, tokens: Sequence[int], *, saving: bool) -> None:
        """Make ready for micro-batches of so many tokens. Raises DoesNotFitError if the disk is too small."""
        self._tokens, self._saving = tokens, saving
        self._forwards = self._released = 0
        offset = 0
        for group, tier in self._tiers.items():
            for batch, count in enumerate(tokens):
                if saving and tier == "disk":
                    self._offsets[group, batch] = offset
                    offset += self._nbytes(count)
        if self._spill is None or self._spill.nbytes < offset:
            self._close_spill()
            if offset:
                self._spill = SpillFile(
                    self._folder,
                    offset,
                    read_rate=self._rates.get("disk_read"),
                    write_rate=self._rates.get("disk_write"),
                )

    def end(self) -> None:
        """Let go of all buffers of the pass."""
        for buffers in (self._here, self._below, self._lane_buffers):
            for tensor in buffers.values():
                self._count(-tensor.untyped_storage().nbytes())
            buffers.clear()
        for tensor in self._leaving:
            self._count(-tensor.untyped_storage().nbytes())
        self._leaving.clear()

    def close(self) -> None:
        """Let go of the disk, too."""
        self.end()
        self._close_spill()

    def make(self, batch: int) -> Tensor:
        """A new hidden state of a micro-batch, where products run, not yet filled."""
        return self._typed(self._buffer(self._nbytes(self._tokens[batch]), gpu=self._on_gpu), batch)

    def drop(self, x: Tensor) -> None:
        """Give back what ``make`` made."""
        self._count(-x.untyped_storage().nbytes())

    def keep(self, group: int, batch: int, x: Tensor) -> None:
        """Keep the input of a group; what is not needed for backward goes at once."""
        tier = self._tiers.get(group) if self._saving else None
        if tier is None:
            self.drop(x)
            return
        self._here[group, batch] = x
        if tier != self._device.compute:
            # The lowering lets this Step wait for saves of ``lanes`` Steps before: their copies have been made.
            self._forwards += 1
            while self._released < self._forwards - 1 - self._lanes and self._leaving:
                self._released += 1
                self.drop(self._leaving.popleft())

    def take(self, group: int, batch: int) -> Tensor:
        """The input of a group for its backward, where products run; the caller drops it afterwards."""
        return self._here.pop((group, batch))

    def down(self, step: Step) -> None:
        """GPU to RAM."""
        key = step.group, step.batch
        x = self._here.pop(key)
        nbytes = self._nbytes(self._tokens[step.batch])
        if self._tiers[step.group] == "disk":
            raw = self._lane("out", step.slot)[:nbytes]
        else:
            raw = self._buffer(nbytes, gpu=False)
        self._device.copy(self._typed(raw, step.batch), x, "d2h")
        self._below[key] = raw
        self._leaving.append(x)

    def write(self, step: Step) -> None:
        """RAM to disk."""
        key = step.group, step.batch
        assert self._spill is not None
        if self._on_gpu:
            self._spill.write(self._offsets[key], self._below.pop(key))
            return
        x = self._here.pop(key)
        self._spill.write(self._offsets[key], _raw(x, self._nbytes(self._tokens[step.batch])))
        self.drop(x)

    def read(self, step: Step) -> None:
        """Disk to RAM."""
        key = step.group, step.batch
        assert self._spill is not None
        nbytes = self._nbytes(self._tokens[step.batch])
        raw = self._lane("in", step.slot)[:nbytes] if self._on_gpu else self._buffer(nbytes, gpu=False)
        self._spill.read(self._offsets[key], raw)
        if self._on_gpu:
            self._below[key] = raw
        else:
            self._here[key] = self._typed(raw, step.batch)

    def up(self, step: Step) -> None:
        """RAM to GPU."""
        key = step.group, step.batch
        raw = self._below[key] if self._tiers[step.group] == "cpu" else self._below.pop(key)
        x = self.make(step.batch)
        self._device.copy(x, self._typed(raw, step.batch), "h2d")
        self._here[key] = x

    def _typed(self, raw: Tensor, batch: int) -> Tensor:
        count = self._tokens[batch]
        nbytes = count * self._hidden * self._dtype.itemsize
        return raw[:nbytes].view(self._dtype).view(count, self._hidden)

    def _nbytes(self, tokens: int) -> int:
        return align_up(tokens * self._hidden * self._dtype.itemsize)

    def _lane(self, way: str, number: int) -> Tensor:
        key = way, number
        if key not in self._lane_buffers:
            self._lane_buffers[key] = self._buffer(self._nbytes(max(self._tokens)), gpu=False)
        return self._lane_buffers[key]

    def _buffer(self, nbytes: int, *, gpu: bool) -> Tensor:
        raw = self._device.gpu_buffer(nbytes) if gpu else self._device.host_buffer(nbytes)
        self._count(raw.untyped_storage().nbytes())
        return raw

    def _count(self, nbytes: int) -> None:
        self._changes.append(nbytes)

    def _close_spill(self) -> None:
        if self._spill is not None:
            self._read, self._written = self.bytes_read, self.bytes_written
            self._spill.close()
            self._spill = None


def _raw(x: Tensor, nbytes: int) -> Tensor:
    """The whole blocks that a hidden state lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage(), 0, (nbytes,), (1,))
