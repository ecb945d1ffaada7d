"""Brings KV pages to where they are attended to and back, and says where that is. Knows no attention.

Pages of a micro-batch that have to travel stand side by side in a lane, in the order of its slices; one that several
of them share is there once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from flexbatch.memory.kv import KVMemory, StagedPage
from flexbatch.runtime.device import Device
from flexbatch.scheduler.lowering import Routes
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.sweep import MicroBatch


@dataclass(frozen=True, slots=True)
class Staging:
    """The pages of a micro-batch in a lane; ``tables`` has the places of each slice's pages there."""

    pages: list[StagedPage] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)


class KVMoves:
    """Carries out the ``kv_*`` Steps of one run."""

    def __init__(self, memory: KVMemory, routes: Routes, device: Device) -> None:
        self._memory = memory
        self._routes = routes
        self._device = device

    def stage(self, batch: MicroBatch) -> Staging | None:
        """Where the pages of ``batch`` will stand in a lane, or None if they are attended to where they rest."""
        if not self._routes.staged_kv(batch):
            return None
        staging = Staging()
        size = self._memory.shape.page_tokens
        shared: dict[int, int] = {}  # page -> its place, for those that several slices may hold
        for piece in batch.slices:
            count = -(-piece.stop // size)
            table = []
            for place, page in enumerate(piece.sequence.pages.pages[:count]):
                found = shared.get(page) if place < piece.sequence.shared else None
                if found is None:
                    found = len(staging.pages)
                    staging.pages.append(
                        StagedPage(page, filled=place * size < piece.start, dirty=place >= piece.start // size)
                    )
                    if place < piece.sequence.shared:
                        shared[page] = found
                table.append(found)
            staging.tables.append(table)
        return staging

    def layer(self, step: Step, batch: MicroBatch, staging: Staging | None) -> Tensor:
        """The pages that the attention of ``step`` reads and writes, [pages, kv_heads, 2, page_tokens, head_dim]."""
        if staging is None:
            return self._memory.pools[batch.kv].layer(step.group - 1)
        lanes = self._memory.gpu_lanes if self._routes.attends_on(batch) == "gpu" else self._memory.host_lanes
        return self._memory.shape.view(lanes[step.slot])

    def read(self, step: Step, staging: Staging) -> None:
        """Disk to host lane."""
        assert self._memory.disk is not None
        self._memory.disk.read(step.group - 1, self._memory.host_lanes[step.slot], staging.pages)

    def write(self, step: Step, staging: Staging) -> None:
        """Host lane to disk."""
        assert self._memory.disk is not None
        self._memory.disk.write(step.group - 1, self._memory.host_lanes[step.slot], staging.pages)

    def up(self, step: Step, batch: MicroBatch, staging: Staging) -> None:
        """Host to GPU lane."""
        for page, host, gpu in self._pairs(step, batch, staging):
            if page.filled:
                self._device.copy(gpu, host, "h2d")

    def down(self, step: Step, batch: MicroBatch, staging: Staging) -> None:
        """GPU lane to host."""
        for page, host, gpu in self._pairs(step, batch, staging):
            if page.dirty:
                self._device.copy(host, gpu, "d2h")

    def _pairs(self, step: Step, batch: MicroBatch, staging: Staging) -> Iterator[tuple[StagedPage, Tensor, Tensor]]:
        """Each page with its place on the host (its pool, or a lane) and in the GPU lane."""
        shape = self._memory.shape
        gpu = shape.view(self._memory.gpu_lanes[step.slot])
        lane = shape.view(self._memory.host_lanes[step.slot]) if batch.kv == "disk" else None
        for place, page in enumerate(staging.pages):
            host = self._memory.pools["cpu"].layer(step.group - 1)[page.page] if lane is None else lane[place]
            yield page, host, gpu[place]
