"""How fast the disk tier reads and writes: threads and request sizes, against plainer ways of doing the same.

    python benchmarks/disk_read.py --folder /var/tmp [--size 1GiB] [--runs 3] [--output benchmarks/results/NAME.json]

Makes a file of random bytes, reads all of it each way in turns, and removes it. Medians, in bytes/s. "one thread" is
what dd iflag=direct does; "memmap" copies out of np.memmap with nothing of the file in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flexbatch.memory.aligned import BLOCK, aligned_buffer, aligned_bytes
from flexbatch.memory.direct import DirectReader, Extent, ReadPlan, plan_reads
from flexbatch.memory.spill import SpillFile
from flexbatch.units import GIB, KIB, MIB, parse_size

THREADS = (1, 2, 4, 8)
REQUESTS = (256 * KIB, MIB, 4 * MIB, 16 * MIB)
PAGES = (64 * KIB, 512 * KIB)
SPILLED = 256 * MIB  # bytes moved through a spill file per turn
ROW_BYTES = 8192  # an embedding of 4096 half-precision numbers
ROWS = 2048

Way = Callable[[], int]
"""Moves bytes and says how many."""


def make_file(path: Path, size: int) -> None:
    """Write random bytes, and leave none of them in the page cache."""
    with path.open("wb") as file:
        for begin in range(0, size, 64 * MIB):
            file.write(os.urandom(min(64 * MIB, size - begin)))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_thread(path: Path, buffer: Tensor, request: int) -> int:
    """Read the file front to back with one direct request after the other."""
    view = aligned_bytes(buffer)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        size = os.fstat(fd).st_size
        return sum(os.preadv(fd, [view[begin : begin + request]], begin) for begin in range(0, size, request))
    finally:
        os.close(fd)


def memmap(path: Path, buffer: Tensor) -> int:
    """Copy the file out of a cold memory map, as FlexGen reads its weights."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    source = np.memmap(path, dtype=np.uint8, mode="r")
    buffer.numpy()[: len(source)] = source
    return len(source)


def direct(plan: ReadPlan, buffer: Tensor, threads: int, request: int) -> int:
    """Read the plan with a reader of its own."""
    with closing(DirectReader(threads=threads, request_bytes=request)) as reader:
        return reader.read(plan, buffer)


def rows(path: Path, threads: int) -> int:
    """Gather scattered rows, as a look-up in a table on the disk does."""
    count = path.stat().st_size // ROW_BYTES - 1
    with closing(DirectReader(threads=threads)) as reader:
        return reader.read_rows(path, 100, ROW_BYTES, [random.randrange(count) for _ in range(ROWS)]).numel()


def measure(ways: dict[str, Way], runs: int) -> dict[str, float]:
    """Median bytes/s of each way, taken in turns."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            started = time.perf_counter()
            count = way()
            rates[name].append(count / (time.perf_counter() - started))
    return {name: round(statistics.median(found)) for name, found in rates.items()}


def every_direct_way(path: Path, plan: ReadPlan, buffer: Tensor) -> dict[str, Way]:
    """Ours, at every number of threads and size of requests."""
    ways: dict[str, Way] = {}
    for threads in THREADS:
        for request in REQUESTS:
            ways[f"direct, {threads} threads, {request // KIB} KiB"] = partial(direct, plan, buffer, threads, request)
        ways[f"rows of {ROW_BYTES} bytes, {threads} threads"] = partial(rows, path, threads)
    return ways


def reading(path: Path, size: int, runs: int) -> dict[str, float]:
    """Rates of reading the whole file, and of rows out of it."""
    buffer = aligned_buffer(size + BLOCK).fill_(0)  # its memory is there before the clock runs
    plan = plan_reads([Extent(path, 0, size)])
    plain: dict[str, Way] = {
        "one thread, 1 MiB": partial(one_thread, path, buffer, MIB),
        "one thread, 4 MiB": partial(one_thread, path, buffer, 4 * MIB),
        "memmap": partial(memmap, path, buffer),
    }
    return measure(plain | every_direct_way(path, plan, buffer), runs)


def moved(move: Callable[[list[tuple[int, Tensor]]], None], parts: list[tuple[int, Tensor]]) -> int:
    """Move pages and say how many bytes that were."""
    move(parts)
    return sum(part.nbytes for _, part in parts)


def spilling(folder: Path, runs: int) -> dict[str, float]:
    """Rates of writing and reading scattered pages: every other place of the file, for neighbours would be joined."""
    found: dict[str, float] = {}
    for page in PAGES:
        pages = aligned_buffer(SPILLED).fill_(1).view(-1, page)
        places = random.sample(range(len(pages)), len(pages))
        parts = [(2 * place * page, part) for place, part in zip(places, pages, strict=True)]
        for threads in THREADS:
            with closing(SpillFile(folder, 2 * SPILLED, threads=threads)) as spill:
                spill.write_many(parts)  # what was reserved is slower when first written
                name = f"{page // KIB} KiB pages, {threads} threads"
                write, read = partial(moved, spill.write_many, parts), partial(moved, spill.read_many, parts)
                found |= measure({f"write {name}": write, f"read {name}": read}, runs)
    return found


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--size", type=parse_size, default=GIB)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "random.bin"
        make_file(path, options.size)
        read = reading(path, options.size, options.runs)
        report: dict[str, Any] = {
            "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
            "bytes": options.size,
            "runs": options.runs,
            "read_bytes_per_s": read,
            "spill_bytes_per_s": spilling(Path(folder), options.runs),
        }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
