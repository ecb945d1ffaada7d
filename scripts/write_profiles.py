"""Writes the hardware profiles that ship with the package from data sheets, papers and stated efficiency factors.

Every figure of a profile gets a source. ``--check`` changes nothing and says whether a file differs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.policy.machines import profile_text
from flexbatch.policy.profile import parse_profile

FOLDER = Path(__file__).resolve().parent.parent / "flexbatch" / "assets" / "profiles"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

# What software reaches of a data sheet's figure. Assumptions, all in one place.
PRODUCT = 0.7  # large matrix products of the peak
MEMORY = 0.8  # reading weights or pages of the memory bandwidth
PCIE = 0.8  # pinned copies of the raw link: 12.6 of 15.75 GB/s on PCIe 3.0, where FlexGen fitted 12.89
DRIVE = 0.9  # long direct reads and writes of the drive's figure
ATTENTION = 0.4  # fused attention of prompts of the peak
CPU_PRODUCT = 0.6
CPU_ATTENTION = 0.5  # of the CPU's product rate, in prompts
PACKED_NUMBER = 0.5625  # bytes of a number of packed KV
CPU_UNPACK, CPU_PACK = 134, 3_700  # FLOPs of products in the time that a number of KV takes; measured, see below
CPU_PACKED_SOURCE = "in the time of {} FLOPs of products, as measured by flexbatch profile on two Zen 4 cores"
GPU_UNPACK, GPU_PACK = 5, 300  # fp32 instructions that a number of KV takes in the kernels, counted in their source
GPU_ISSUE = 0.5  # of the instructions that the peak of fp32 (two FLOPs each) stands for
PCIE_GB = {3: 15.75, 4: 31.5, 5: 63.0}
_STEP_GPU, _STEP_CPU = 20e-6, 35e-6


@dataclass(frozen=True)
class Gpu:
    """A data sheet: GiB addressable, TFLOP/s of 16-bit products (dense, fp32 sums) and of fp32, GB/s of its memory."""

    sheet: str
    gib: float
    gib_note: str
    half: float
    single: float
    memory: float
    pcie: int
    bf16: bool = True


@dataclass(frozen=True)
class Host:
    """The rest of the machine: GB of RAM and disk, GB/s of the drive, cores' peak fp32 TFLOP/s, GB/s of RAM."""

    name: str
    ram: str
    disk: str
    ram_note: str
    disk_note: str
    read: float
    write: float
    drive: str
    cpu: str
    peak: float
    memory: float
    memory_note: str


_DESKTOP_DRIVE = "Samsung 980 PRO data sheet: sequential read 7.0 GB/s, write 5.0 GB/s (PCIe 4.0 x4)"
RYZEN_5800X = Host(
    "desktop",
    "64GiB",
    "1e12",
    "assumed: a desktop with 4 x 16 GiB",
    "assumed: a 1 TB drive, empty",
    7.0,
    5.0,
    _DESKTOP_DRIVE,
    "8 Zen 3 cores at 3.8 GHz, AVX2, 32 FLOP a cycle (Ryzen 7 5800X, assumed)",
    0.97,
    51.2,
    "two channels of DDR4-3200",
)
RYZEN_7950X = Host(
    "desktop",
    "128GiB",
    "2e12",
    "assumed: a desktop with 4 x 32 GiB",
    "assumed: a 2 TB drive, empty",
    7.45,
    6.9,
    "Samsung 990 PRO data sheet: sequential read 7.45 GB/s, write 6.9 GB/s (PCIe 4.0 x4)",
    "16 Zen 4 cores at 4.5 GHz, 32 FLOP a cycle (Ryzen 9 7950X, assumed)",
    2.3,
    83.2,
    "two channels of DDR5-5200",
)
N1_HIGHMEM = Host(
    "Google Cloud n1-highmem-32",
    "208GB",
    "1.5e12",
    "FlexGen paper, section 6: 208 GB",
    "FlexGen paper, section 6: 1.5 TB",
    2.0,
    1.0,
    "FlexGen paper, section 6: NVMe, read about 2 GB/s, write about 1 GB/s",
    "16 Skylake cores at 2.0 GHz, AVX-512, 64 FLOP a cycle (32 vCPU of n1-highmem-32)",
    2.05,
    50.0,
    "assumed share of 16 of 28 cores in a socket's six channels of DDR4-2666, 128 GB/s, less what neighbours take",
)
G5 = Host(
    "AWS g5.8xlarge",
    "128GiB",
    "9e11",
    "AWS instance types: 128 GiB",
    "AWS instance types: one NVMe drive of 900 GB",
    2.0,
    1.0,
    "assumed: AWS publishes no sequential rate; read 2 GB/s, write 1 GB/s",
    "16 Zen 2 cores at 2.8 GHz, AVX2, 32 FLOP a cycle (32 vCPU of EPYC 7R32)",
    1.43,
    68.0,
    "assumed share of 16 of 48 cores in a socket's eight channels of DDR4-3200, 204.8 GB/s",
)
G2 = Host(
    "Google Cloud g2-standard-32",
    "128GB",
    "3.75e11",
    "Google Cloud machine types: 128 GB",
    "Google Cloud machine types: one local SSD of 375 GB",
    0.66,
    0.35,
    "Google Cloud documentation, Local SSD performance: 660 MB/s read, 350 MB/s write for 375 GB",
    "16 Cascade Lake cores at 2.2 GHz, AVX-512, 64 FLOP a cycle (32 vCPU)",
    2.25,
    60.0,
    "assumed share of 16 of 28 cores in a socket's six channels of DDR4-2933, 140 GB/s, less what neighbours take",
)
A2 = Host(
    "Google Cloud a2-highgpu-1g",
    "85GB",
    "3e12",
    "Google Cloud machine types: 85 GB",
    "eight local SSDs of 375 GB",
    2.65,
    1.4,
    "Google Cloud documentation, Local SSD performance: 2,650 MB/s read, 1,400 MB/s write for 3 TB",
    "6 Cascade Lake cores at 2.2 GHz, AVX-512, 64 FLOP a cycle (12 vCPU)",
    0.84,
    30.0,
    "assumed share of 6 of 24 cores in a socket's six channels of DDR4-2933, 140 GB/s",
)
SERVER = Host(
    "server",
    "256GiB",
    "3.84e12",
    "assumed: a server with 8 x 32 GiB",
    "assumed: a 3.84 TB drive, empty",
    6.5,
    3.5,
    "Samsung PM9A3 data sheet: sequential read 6.5 GB/s, write 3.5 GB/s (PCIe 4.0 x4)",
    "32 Sapphire Rapids cores at 2.0 GHz, AVX-512, 64 FLOP a cycle (assumed)",
    4.1,
    307.2,
    "eight channels of DDR5-4800",
)
_ECC = "less a sixteenth for ECC"
_USABLE = "about 0.5 GiB of it reserved"
MACHINES: dict[str, tuple[Gpu, Host]] = {
    "t4": (Gpu("NVIDIA T4", 15.0, f"16 GB GDDR6, {_ECC}", 65.0, 8.1, 320.0, 3, bf16=False), N1_HIGHMEM),
    "rtx3060": (Gpu("NVIDIA GeForce RTX 3060 (GA106)", 12.0, "12 GB GDDR6", 25.4, 12.7, 360.0, 4), RYZEN_5800X),
    "rtx3090": (Gpu("NVIDIA GA102 whitepaper, RTX 3090", 24.0, "24 GB GDDR6X", 71.0, 35.6, 936.0, 4), RYZEN_5800X),
    "rtx4090": (Gpu("NVIDIA Ada whitepaper, RTX 4090", 24.0, "24 GB GDDR6X", 165.2, 82.6, 1008.0, 4), RYZEN_7950X),
    "a10g": (Gpu("NVIDIA A10G (AWS G5)", 22.5, f"24 GB GDDR6, {_ECC}", 70.0, 35.0, 600.0, 4), G5),
    "l4": (Gpu("NVIDIA L4", 22.5, f"24 GB GDDR6, {_ECC}", 121.0, 30.3, 300.0, 4), G2),
    "a100-40": (Gpu("NVIDIA A100 40GB", 39.5, f"40 GB HBM2, {_USABLE}", 312.0, 19.5, 1555.0, 4), A2),
    "h100": (Gpu("NVIDIA H100 PCIe", 79.5, f"80 GB HBM2e, {_USABLE}", 756.0, 51.0, 2000.0, 5), SERVER),
}  # fmt: skip

# Where FlexGen measured its own machine, that is taken instead of the rules above.
MEASURED: dict[str, dict[str, tuple[float, str]]] = {
    "t4": {
        "half": (21.24e12, "FlexGen, fitted constants of its T4 machine: 21.24 TFLOP/s in prefill products"),
        "attention_flops": (9.97e12, "FlexGen, fitted constants of its T4 machine: 9.97 TFLOP/s in prefill attention"),
        "h2d": (12.89e9, "FlexGen, fitted constants of its T4 machine: 12.89 GB/s from CPU to GPU (PCIe 3.0 x16)"),
    },
}


def curve(peak: float, bandwidth: float, weight_bytes: int) -> list[list[float]]:
    """FLOP/s by rows: the time to read the weights (two FLOPs a weight and row) plus the time to multiply."""
    return [[rows, rounded(1 / (1 / (rows * 2 * bandwidth / weight_bytes) + 1 / peak))] for rows in ROWS]


def rounded(value: float) -> float:
    """Four significant digits: no data sheet has more."""
    return float(f"{value:.4g}")


def profile(name: str) -> dict[str, Any]:
    """The profile's JSON object."""
    gpu, host = MACHINES[name]
    known = MEASURED.get(name, {})
    sources: dict[str, str] = {}

    def figure(place: str, value: float, source: str, measured: str = "") -> float:
        if measured in known:
            value, source = known[measured]
        sources[place] = source
        return rounded(value)

    memory = {"gpu": f"{gpu.gib:g}GiB", "cpu": host.ram, "disk": int(float(host.disk))}
    sources["memory.gpu"] = f"{gpu.sheet} data sheet: {gpu.gib_note}"
    sources["memory.cpu"], sources["memory.disk"] = host.ram_note, host.disk_note
    link = f"PCIe {gpu.pcie}.0 x16, {PCIE_GB[gpu.pcie]:g} GB/s each way; {PCIE:.0%} assumed for pinned copies"
    pcie = PCIE * PCIE_GB[gpu.pcie] * 1e9
    links = {
        "h2d": figure("links.h2d", pcie, link, "h2d"),
        "d2h": figure("links.d2h", pcie, link),
        "disk_read": figure("links.disk_read", DRIVE * host.read * 1e9, f"{host.drive}; {DRIVE:.0%} assumed"),
        "disk_write": figure("links.disk_write", DRIVE * host.write * 1e9, f"{host.drive}; {DRIVE:.0%} assumed"),
    }
    if host is N1_HIGHMEM:
        links["disk_read"] = figure("links.disk_read", host.read * 1e9, host.drive)
        links["disk_write"] = figure("links.disk_write", host.write * 1e9, host.drive)
    return {
        "name": f"{name} ({gpu.sheet.split(',')[-1].strip()}, {host.name})",
        "memory": memory,
        "links": links,
        "cpu": _cpu(host, figure),
        "gpu": _gpu(gpu, figure, known),
        "sources": sources,
    }


def _gpu(gpu: Gpu, figure: Any, known: dict[str, tuple[float, str]]) -> dict[str, Any]:
    bandwidth = MEMORY * gpu.memory * 1e9
    read = f"weights read at {MEMORY:.0%} of {gpu.memory:g} GB/s ({gpu.sheet} data sheet)"
    half = f"{PRODUCT:.0%} assumed of {gpu.half:g} TFLOP/s, 16 bit with fp32 sums, dense ({gpu.sheet} data sheet)"
    peak = figure("gpu.products.float16", PRODUCT * gpu.half * 1e12, half, "half")
    figure("gpu.products.float16", peak, f"{known['half'][1] if 'half' in known else half}; {read}")
    products = {"float16": curve(peak, bandwidth, 2)}
    if gpu.bf16:
        figure("gpu.products.bfloat16", peak, f"as float16: {half}; {read}")
        products["bfloat16"] = products["float16"]
    single = f"{PRODUCT:.0%} assumed of {gpu.single:g} TFLOP/s in fp32, TF32 off ({gpu.sheet} data sheet); {read}"
    products["float32"] = curve(figure("gpu.products.float32", PRODUCT * gpu.single * 1e12, single), bandwidth, 4)
    issued = f"instructions a number at {GPU_ISSUE:.0%} of {gpu.single:g} TFLOP/s in fp32, two FLOPs each; assumed"

    def instructions(each: int) -> float:
        """How often a second so many instructions can be issued."""
        return GPU_ISSUE * gpu.single * 1e12 / 2 / each

    widened = {}
    for stored, nbytes in (("float16", 6.0), ("bfloat16", 6.0), ("int4", 2.5625)):
        what = f"{nbytes:g} bytes a weight, read and written, at {MEMORY:.0%} of {gpu.memory:g} GB/s (data sheet)"
        widened[stored] = figure(f"gpu.widened.{stored}", bandwidth / nbytes, what)
    return {
        "products": products,
        "widened": widened,
        "attention_bytes": figure(
            "gpu.attention_bytes", bandwidth, f"{MEMORY:.0%} assumed of {gpu.memory:g} GB/s ({gpu.sheet} data sheet)"
        ),
        "attention_flops": figure(
            "gpu.attention_flops",
            ATTENTION * gpu.half * 1e12,
            f"{ATTENTION:.0%} assumed of {gpu.half:g} TFLOP/s ({gpu.sheet} data sheet)",
            "attention_flops",
        ),
        "packed_attention": figure(
            "gpu.packed_attention",
            1 / (PACKED_NUMBER / bandwidth + 1 / instructions(GPU_UNPACK)),
            f"{PACKED_NUMBER} bytes a number at {MEMORY:.0%} of {gpu.memory:g} GB/s, and {GPU_UNPACK} {issued}",
        ),
        "packing": figure("gpu.packing", instructions(GPU_PACK), f"{GPU_PACK} {issued}"),
        "step_s": figure("gpu.step_s", _STEP_GPU, "assumed: a few kernel launches of about 5 microseconds"),
    }


def _cpu(host: Host, figure: Any) -> dict[str, Any]:
    bandwidth = MEMORY * host.memory * 1e9
    read = f"{MEMORY:.0%} assumed of {host.memory:g} GB/s ({host.memory_note})"
    peak = CPU_PRODUCT * host.peak * 1e12
    what = f"{CPU_PRODUCT:.0%} assumed of {host.peak:g} TFLOP/s: {host.cpu}; weights read at {read}"
    widened = {}
    for stored, nbytes in (("float16", 6.0), ("bfloat16", 6.0), ("int4", 4.5625)):
        widened[stored] = figure(f"cpu.widened.{stored}", bandwidth / nbytes, f"{nbytes:g} bytes a weight at {read}")
    return {
        "products": {"float32": curve(figure("cpu.products.float32", peak, what), bandwidth, 4)},
        "widened": widened,
        "attention_bytes": figure("cpu.attention_bytes", bandwidth, read),
        "attention_flops": figure(
            "cpu.attention_flops", CPU_ATTENTION * peak, f"{CPU_ATTENTION:.0%} assumed of the rate of products"
        ),
        "packed_attention": figure(
            "cpu.packed_attention",
            min(bandwidth / PACKED_NUMBER, peak / CPU_UNPACK),
            f"{CPU_PACKED_SOURCE.format(CPU_UNPACK)}, or {PACKED_NUMBER} bytes a number at {read}",
        ),
        "packing": figure("cpu.packing", peak / CPU_PACK, CPU_PACKED_SOURCE.format(CPU_PACK)),
        "step_s": figure("cpu.step_s", _STEP_CPU, "measured by flexbatch profile on two EPYC cores; taken for all"),
    }


def main() -> int:
    """Write or check all profiles; return 1 when a check finds a difference."""
    parser = argparse.ArgumentParser(description="Write the hardware profiles that ship with the package.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when a file differs")
    check = parser.parse_args().check
    status = 0
    FOLDER.mkdir(exist_ok=True)
    for name in MACHINES:
        path = FOLDER / f"{name}.json"
        text = profile_text(parse_profile(profile(name), name))
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            print(f"{path} is stale: run scripts/write_profiles.py", file=sys.stderr)
            status = 1
        elif not check:
            path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
