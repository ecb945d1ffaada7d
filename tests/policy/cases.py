"""Models, machines and workloads for tests of the policy: real shapes, made-up figures."""

from __future__ import annotations

import functools
import random

from flexbatch.checkpoint.locate import locate
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.options import EngineOptions
from flexbatch.policy.candidates import Shop
from flexbatch.policy.footprint import ModelSize, UnitSize
from flexbatch.policy.machine import Machine
from flexbatch.policy.profile import Curve, HardwareProfile, Processor
from flexbatch.policy.workload import Workload

MODELS = (
    "opt-125m",
    "opt-1.3b",
    "opt-6.7b",
    "opt-30b",
    "opt-175b",
    "llama-2-7b",
    "llama-3-8b",
    "qwen2.5-7b",
    "gpt2-xl",
)
GB = 10**9


@functools.cache
def model(name: str) -> tuple[ModelSize, tuple[UnitSize, ...]]:
    """Sizes and units of a packaged configuration, without a checkpoint."""
    shape = locate(name, dummy=True).shape
    table = family_of(shape).table(shape)
    size = model_size(shape, table)
    ties, last = dict(table.tied), len(table.groups) - 1
    units: dict[str, UnitSize] = {}
    for index, group in enumerate(table.groups):
        tables = [(v.tensor, v.shape[0] * v.shape[1], True) for v in group.vectors if v.shape[0] == shape.vocab_size]
        linears = [(f"{li.parts[0].module}.weight", li.in_features * li.out_features, False) for li in group.linears]
        for tensor, elements, is_table in (*tables, *linears):
            key = ties.get(group.prefix + tensor, group.prefix + tensor)
            before = units.get(key)
            groups = (index,) if before is None else (*before.groups, index)
            looked_up = is_table or (before is not None and before.table)
            nbytes = elements * size.stored_bytes
            units[key] = UnitSize(key, groups, nbytes, elements, index in (0, last), looked_up)
    return size, tuple(units.values())


def processor(rate: float, *, attention: float, step_s: float = 2e-5) -> Processor:
    """A processor that reaches ``rate`` FLOP/s with many rows."""
    points = tuple((rows, rate * rows / (rows + 48)) for rows in (1, 8, 64, 512, 4096))
    types = ("float32", "float16", "bfloat16")
    return Processor(
        products=dict.fromkeys(types, Curve(points)),
        widened={**dict.fromkeys(types, rate / 20), "int4": rate / 30},
        attention_bytes=attention,
        attention_flops=rate / 3,
        step_s=step_s,
    )


def profile(*, gpu: float | None = 2e13, cpu: float = 5e11, pcie: float = 12e9, read: float = 2e9) -> HardwareProfile:
    """A machine by its product rates and links."""
    disk = {"disk_read": read, "disk_write": read / 2}
    links = disk if gpu is None else {"h2d": pcie, "d2h": pcie, **disk}
    device = None if gpu is None else processor(gpu, attention=gpu / 80)
    return HardwareProfile("made up", {}, links, processor(cpu, attention=cpu / 12), device)


def machine(profile: HardwareProfile, gpu: float, cpu: float, disk: float = 1000.0) -> Machine:
    """Budgets in GB; products on the GPU where there is one."""
    if profile.gpu is None:
        return Machine("cpu", 0, int(cpu * GB), int(disk * GB), "float32")
    return Machine("gpu", int(gpu * GB), int(cpu * GB), int(disk * GB), "float16")


def random_shop(seed: int) -> Shop:
    """A random model, machine, job and, now and then, options."""
    rng = random.Random(seed)
    name = rng.choice(MODELS)
    size, units = model(name)
    whole = sum(unit.nbytes for unit in units) / GB
    on_gpu = rng.random() < 0.75
    figures = profile(
        gpu=10 ** rng.uniform(12.5, 14.5) if on_gpu else None,
        cpu=10 ** rng.uniform(10.5, 12.3),
        pcie=10 ** rng.uniform(9.3, 10.8),
        read=10 ** rng.uniform(8.3, 9.9),
    )
    budgets = machine(figures, whole * rng.choice([0.15, 0.4, 1.5]) + 3, whole * rng.choice([0.3, 1.2, 3.0]) + 4)
    rows = rng.choice([1, 7, 60, 1000, 100_000])
    lengths = [(rng.randint(1, 600), rng.randint(1, 200)) for _ in range(min(rows, 40))]
    workload = Workload(*zip(*(lengths * (rows // len(lengths) + 1))[:rows], strict=True))
    bits = rng.choice([16, 16, 4])
    options = EngineOptions(
        weight_bits=4 if bits == 4 else 16,
        kv_bits=4 if rng.random() < 0.3 else 16,
        max_sequences=rng.choice([None, None, 33]),
        cpu_attention=rng.choice([None, True, False]) if on_gpu else None,
    )
    return Shop(name, size, units, workload, options, budgets, figures, size.shape.stored_dtype)
