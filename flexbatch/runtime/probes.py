"""What is measured of a machine: samplers of links, products and attention, each through the code that runs use.

A probe allocates when it is opened and lets go when it is exhausted. How often a sampler is called is not its concern.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.memory.aligned import align_down, aligned_buffer
from flexbatch.memory.direct import DirectReader, Extent, plan_reads
from flexbatch.memory.spill import SpillFile
from flexbatch.options import Resource
from flexbatch.runtime.device import Device
from flexbatch.units import MIB

Sampler = Callable[[], float]
"""Does the thing once and returns its rate: bytes, FLOPs or weights a second."""
_LEAST_S = 0.004  # what is over sooner is repeated within one sample: clocks and hand-overs have a cost


@dataclass(frozen=True, slots=True)
class Probe:
    """``samplers`` yields one sampler for each of ``figures``, in their order, or fewer where one would take too long.

    A figure's name is dotted: ``links.h2d``, ``cpu.products.float32.64`` (at 64 rows).
    """

    figures: tuple[str, ...]
    samplers: Callable[[], Iterator[Sampler]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is moved for one figure. ``room``: the bytes of RAM that all buffers together may take.

    ``file`` bytes are written to the disk and read back, ``piece`` bytes at a time.
    """

    room: int
    file: int
    piece: int


class Stopwatch:
    """Times work that is issued in the lane of one resource, the wait for its end included."""

    def __init__(self, device: Device, resource: Resource) -> None:
        self._device = device
        self._resource: Resource = resource
        self._count = 1

    def seconds(self, work: Callable[[int], None]) -> float:
        """Seconds of one ``work(number)``; short ones are done several times, the number rising from 0."""
        while True:
            passed = self._time(work)
            if passed >= _LEAST_S:
                return passed / self._count
            self._count = max(self._count + 1, int(self._count * min(8.0, 1.5 * _LEAST_S / max(passed, 1e-9))))

    def _time(self, work: Callable[[int], None]) -> float:
        with self._device.lane(self._resource):
            start = time.perf_counter()
            for number in range(self._count):
                work(number)
            done = self._device.mark(self._resource)
            if done is not None:
                done.wait()
            return time.perf_counter() - start


def disk(folder: Path, sizes: Sizes, read_rate: float | None, write_rate: float | None) -> Probe:
    """Writing through the spill file, then reading the same bytes through the reader of weights, in ``folder``.

    The file has no name. Raises DoesNotFitError or UsageError where the spill file does.
    """

    def samplers() -> Iterator[Sampler]:
        piece = align_down(min(sizes.piece, sizes.room // 2))
        pieces = max(1, sizes.file // piece)
        buffer = _random_bytes(piece)  # a file system that compresses would see through zeros
        target = _random_bytes(piece)
        file = SpillFile(folder, pieces * piece, write_rate=write_rate)
        reader = DirectReader(rate=read_rate)
        written = 0

        def write() -> float:
            nonlocal written
            start = time.perf_counter()
            file.write(written % pieces * piece, buffer)
            written += 1
            return piece / (time.perf_counter() - start)

        taken = 0

        def read() -> float:
            nonlocal taken
            # What was never written is answered without the disk.
            plan = plan_reads([Extent(file.path, taken % min(written, pieces) * piece, piece)])
            taken += 1
            start = time.perf_counter()
            reader.read(plan, target)
            return piece / (time.perf_counter() - start)

        try:
            yield write
            yield read
        finally:
            reader.close()
            file.close()

    return Probe(("links.disk_write", "links.disk_read"), samplers)


def copies(device: Device, sizes: Sizes) -> Probe:
    """Copies between RAM and the GPU tier through the device's own lanes."""

    def samplers() -> Iterator[Sampler]:
        piece = align_down(min(sizes.piece, sizes.room // 4, device.gpu_budget // 4))
        hosts = [_touched(device.host_buffer(piece)) for _ in range(2)]
        gpus = [device.gpu_buffer(piece) for _ in range(2)]

        def sampler(resource: Resource) -> Sampler:
            watch = Stopwatch(device, resource)
            pairs = list(zip(gpus, hosts, strict=True) if resource == "h2d" else zip(hosts, gpus, strict=True))

            def sample() -> float:
                return piece / watch.seconds(lambda number: device.copy(*pairs[number % 2], resource))

            return sample

        yield sampler("h2d")
        yield sampler("d2h")

    return Probe(("links.h2d", "links.d2h"), samplers)


def _touched(buffer: Tensor) -> Tensor:
    """``buffer`` with memory behind every byte: the kernel reads what was never written from one cached page."""
    return buffer.fill_(1)


def _random_bytes(nbytes: int) -> Tensor:
    buffer = aligned_buffer(nbytes)
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(0, 256, (MIB,), dtype=torch.uint8, generator=generator)
    for start in range(0, nbytes, MIB):
        part = buffer[start : start + MIB]
        part.copy_(block[: len(part)])
        part[:8] = torch.tensor([start >> shift & 255 for shift in range(0, 64, 8)], dtype=torch.uint8)
    return buffer
