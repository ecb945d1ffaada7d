"""What a CUDA GPU gives flexbatch: attention kernels, links, overlap and matrix products, against what the device can.

    scripts/gpu_bench [--runs 20] [--parts attention links products] [--output FILE.json]

Needs torch and triton only, no network; about three minutes, most of it compiling. Medians. Bytes are those that have
to move (keys and values once), FLOPs those that have to be done (visible pairs, unpadded tokens).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
import triton  # type: ignore[import-untyped]
from torch import Tensor

from flexbatch.kernels import paged_triton
from flexbatch.kernels.attention import Span, prepare
from flexbatch.kernels.paged import PagedQueries, attend_paged, store_paged
from flexbatch.kernels.paged_triton import Tile
from flexbatch.memory.aligned import aligned_buffer
from flexbatch.runtime.cuda import CudaDevice
from flexbatch.units import GIB, MIB

DEVICE = torch.device("cuda:0")
PAGE = 64
PARTS = ("attention", "links", "products")


@dataclass(frozen=True)
class Load:
    """Attention of one micro-batch: heads, and (start, count) of every sequence."""

    name: str
    kv_heads: int
    group: int
    dim: int
    sequences: tuple[tuple[int, int], ...]

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all sequences, 2 bytes a number."""
        return sum(start + count for start, count in self.sequences) * self.kv_heads * self.dim * 4

    @property
    def flops(self) -> int:
        """Both products over visible pairs."""
        pairs = sum(count * start + count * (count + 1) // 2 for start, count in self.sequences)
        return 4 * pairs * self.kv_heads * self.group * self.dim


def decode_loads() -> list[Load]:
    """Rows of one token: even and ragged, few long and many short."""
    rng = random.Random(0)
    ragged = tuple((rng.randint(16, 4000), 1) for _ in range(128))
    return [
        Load("8B, 64 rows of 1024", 8, 4, 128, ((1023, 1),) * 64),
        Load("8B, 256 rows of 512", 8, 4, 128, ((511, 1),) * 256),
        Load("8B, 4 rows of 16384", 8, 4, 128, ((16383, 1),) * 4),
        Load("8B, 128 ragged rows", 8, 4, 128, ragged),
        Load("OPT-6.7B, 48 rows of 544", 32, 1, 128, ((543, 1),) * 48),
        Load("Qwen2-0.5B, 256 rows of 512", 2, 7, 64, ((511, 1),) * 256),
    ]


def prefill_loads() -> list[Load]:
    """Prompts, whole and in chunks."""
    rng = random.Random(1)
    return [
        Load("8B, 8 prompts of 1024", 8, 4, 128, ((0, 1024),) * 8),
        Load("8B, 32 ragged prompts", 8, 4, 128, tuple((0, rng.randint(16, 1024)) for _ in range(32))),
        Load("8B, a chunk of 512 after 4096", 8, 4, 128, ((4096, 512),)),
        Load("OPT-6.7B, 16 prompts of 512", 32, 1, 128, ((0, 512),) * 16),
        Load("Qwen2-0.5B, 16 prompts of 512", 2, 7, 64, ((0, 512),) * 16),
    ]


def seconds(work: Callable[[], object], runs: int) -> float:
    """Median time of ``work`` on the current stream, by events."""
    for _ in range(3):
        work()
    found: list[float] = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def host_seconds(work: Callable[[], object], runs: int) -> float:
    """Median time that the calling thread spends on issuing ``work``."""
    found = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(found)


def device_copy_rate(runs: int) -> float:
    """Bytes/s that a copy within the GPU reads and writes: what a kernel bound by memory can reach."""
    source = torch.empty(GIB, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * GIB / seconds(lambda: target.copy_(source), runs)


def built(load: Load, dtype: torch.dtype) -> tuple[PagedQueries, Tensor, Tensor]:
    """Index records, a pool whose pages are scattered, and queries."""
    needed = [-(-(start + count) // PAGE) for start, count in load.sequences]
    free = list(range(sum(needed)))
    random.Random(2).shuffle(free)
    spans, row = [], 0
    for (start, count), number in zip(load.sequences, needed, strict=True):
        spans.append(Span(row, count, start, [free.pop() for _ in range(number)]))
        row += count
    pool = torch.randn(sum(needed), load.kv_heads, 2, PAGE, load.dim, device=DEVICE, dtype=dtype)
    q = torch.randn(row, load.kv_heads * load.group, load.dim, device=DEVICE, dtype=dtype)
    (queries,) = prepare(spans, PAGE, None, dtype, DEVICE).to(DEVICE).paged
    return queries, pool, q


def tiles(load: Load) -> list[Tile]:
    """Other ways of cutting a program, to see whether ``tile_for`` chooses well."""
    single = load.sequences[0][1] == 1
    rows = (16,) if single else (32, 64, 128)
    smallest = triton.next_power_of_2(load.group)
    found = []
    for row, keys, warps, stages in itertools.product(rows, (32, 64), (2, 4, 8), (2, 3)):
        if row >= smallest and (warps < 8 or row >= 64):
            found.append(Tile(row, keys, warps, stages))
    return found


def tuned(load: Load, dtype: torch.dtype, runs: int) -> list[dict[str, Any]]:
    """Time of every tile, the best first; tiles that this GPU has no room for are left out."""
    queries, pool, q = built(load, dtype)
    out = torch.empty_like(q)
    found = []
    for tile in tiles(load):
        work = partial(paged_triton.attend, out, queries, pool, q, load.dim**-0.5, tile)
        try:
            found.append({"tile": asdict(tile), "seconds": seconds(work, max(3, runs // 4))})
        except triton.runtime.errors.OutOfResources:
            continue
    return sorted(found, key=lambda entry: entry["seconds"])


def padded_sdpa(load: Load, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Fused attention of torch on contiguous keys, all prompts padded to the longest: the usual way without pages."""
    count = max(count for _, count in load.sequences)
    start = max(start for start, _ in load.sequences)
    heads = load.kv_heads * load.group
    q = torch.randn(len(load.sequences), heads, count, load.dim, device=DEVICE, dtype=dtype)
    k, v = (
        torch.randn(len(load.sequences), heads, start + count, load.dim, device=DEVICE, dtype=dtype) for _ in range(2)
    )
    mask = None
    if start:
        mask = torch.ones(count, start + count, dtype=torch.bool, device=DEVICE).tril(start)
    return lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def attention(runs: int) -> dict[str, Any]:
    """Decoding against the device's bandwidth, prompts against torch, the store of keys and values, host time."""
    copy_rate = device_copy_rate(runs)
    report: dict[str, Any] = {"device_copy_bytes_per_s": copy_rate, "decode": [], "prefill": [], "tiles": {}}
    for load, dtype in itertools.product(decode_loads(), (torch.float16, torch.bfloat16)):
        queries, pool, q = built(load, dtype)
        work = partial(attend_paged, (queries,), pool, q, load.dim**-0.5)
        rate = load.kv_bytes / seconds(work, runs)
        entry = {"load": load.name, "dtype": str(dtype), "bytes_per_s": rate, "of_copy": rate / copy_rate}
        report["decode"].append(entry | {"host_s": host_seconds(work, runs)})
    for load in prefill_loads():
        queries, pool, q = built(load, torch.float16)
        rate = load.flops / seconds(partial(attend_paged, (queries,), pool, q, load.dim**-0.5), runs)
        torch_rate = load.flops / seconds(padded_sdpa(load, torch.float16), runs)
        entry = {"load": load.name, "flops_per_s": rate, "torch_padded_flops_per_s": torch_rate}
        report["prefill"].append(entry | {"ratio": rate / torch_rate})
    for load in (decode_loads()[0], decode_loads()[4], prefill_loads()[0], prefill_loads()[3]):
        report["tiles"][load.name] = tuned(load, torch.float16, runs)[:6]
    report["store"] = store_rate(runs)
    return report


def store_rate(runs: int) -> dict[str, float]:
    """Bytes/s that the store of 4096 tokens reads and writes."""
    pool = torch.empty(256, 8, 2, PAGE, 128, device=DEVICE, dtype=torch.float16)
    places = torch.randperm(256 * PAGE)[:4096]
    pages, offsets = (places // PAGE).to(DEVICE), (places % PAGE).to(DEVICE)
    k, v = (torch.randn(4096, 8, 128, device=DEVICE, dtype=torch.float16) for _ in range(2))
    work = partial(store_paged, pool, pages, offsets, k, v)
    return {"bytes_per_s": 4 * k.nbytes / seconds(work, runs), "host_s": host_seconds(work, runs)}


def links(runs: int) -> dict[str, Any]:
    """Rates of copies from and to RAM, registered and not, and how well they hide behind products."""
    device = CudaDevice()
    try:
        report: dict[str, Any] = {"bytes_per_s": {}}
        gpu = device.gpu_buffer(512 * MIB)
        registered, plain = device.host_buffer(512 * MIB), aligned_buffer(512 * MIB)
        plain.fill_(1)
        for kind, host in (("registered", registered), ("unregistered", plain)):
            for size in (64 * 1024, MIB, 16 * MIB, 256 * MIB):
                with device.lane("h2d"):
                    there = seconds(partial(device.copy, gpu[:size], host[:size], "h2d"), runs)
                with device.lane("d2h"):
                    back = seconds(partial(device.copy, host[:size], gpu[:size], "d2h"), runs)
                report["bytes_per_s"][f"{kind}, {size // 1024} KiB"] = {"h2d": size / there, "d2h": size / back}
        report["overlap"] = overlap(device, gpu, registered, runs)
        start = time.perf_counter()
        device.host_buffer(GIB)
        report["register_bytes_per_s"] = GIB / (time.perf_counter() - start)
        return report
    finally:
        device.close()


def overlap(device: CudaDevice, gpu: Tensor, host: Tensor, runs: int) -> dict[str, float]:
    """Seconds of products alone, copies each way alone, and all three streams at once."""
    half = gpu.nbytes // 2
    with device.lane("gpu"):
        a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.float16)
        one = seconds(lambda: a @ a, runs)
    with device.lane("h2d"):
        copying = seconds(partial(device.copy, gpu[:half], host[:half], "h2d"), runs)
    products = max(1, round(copying / one))  # as long as a copy

    def multiply() -> None:
        with device.lane("gpu"):
            for _ in range(products):
                torch.mm(a, a)

    def load() -> None:
        with device.lane("h2d"):
            device.copy(gpu[:half], host[:half], "h2d")

    def save() -> None:
        with device.lane("d2h"):
            device.copy(host[half:], gpu[half:], "d2h")

    def elapsed(*parts: Callable[[], None]) -> float:
        found = []
        for _ in range(runs):
            device.synchronize()
            start = time.perf_counter()
            for part in parts:
                part()
            device.synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    alone = {"products": elapsed(multiply), "h2d": elapsed(load), "d2h": elapsed(save)}
    together = {"products and h2d": elapsed(multiply, load), "all": elapsed(multiply, load, save)}
    return alone | together | {"slowest alone over all": max(alone.values()) / together["all"]}


def products(runs: int) -> list[dict[str, Any]]:
    """FLOP/s of y = x W' for T tokens, W [14336, 4096]: from bound by memory to bound by compute."""
    found: list[dict[str, Any]] = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = torch.randn(14336, 4096, device=DEVICE, dtype=dtype)
        for tokens in (1, 16, 64, 256, 1024, 4096):
            x = torch.randn(tokens, 4096, device=DEVICE, dtype=dtype)
            took = seconds(partial(functional.linear, x, weight), runs)
            flops = 2 * tokens * weight.numel() / took
            found.append({"dtype": str(dtype), "tokens": tokens, "flops_per_s": flops, "seconds": took})
    return found


def machine() -> dict[str, Any]:
    """What was measured on."""
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "gpu": properties.name,
        "memory": properties.total_memory,
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    measures: dict[str, Callable[[int], Any]] = {"attention": attention, "links": links, "products": products}
    report: dict[str, Any] = {"machine": machine(), "runs": options.runs}
    for part in options.parts:
        report[part] = measures[part](options.runs)
        text = json.dumps(report, indent=2)
        if options.output:  # after every part: what is measured stays if a later part fails
            options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
