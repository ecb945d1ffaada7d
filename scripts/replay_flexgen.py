"""Replays FlexGen's published runs on its T4 machine, then plans the same jobs: the tables of ``docs/flexgen.md``.

    python scripts/replay_flexgen.py

Rates are those that FlexGen fitted on its machine, except where ``docs/flexgen.md`` says what was assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexbatch.checkpoint.locate import locate
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.options import EngineOptions
from flexbatch.policy.footprint import ModelSize, UnitSize, packed_bytes
from flexbatch.policy.machine import Machine
from flexbatch.policy.profile import Curve, HardwareProfile, Processor
from flexbatch.policy.search import choose
from flexbatch.policy.workload import Workload

TERA, GIGA = 1e12, 1e9
UP, DOWN_CACHE, DOWN_HIDDEN = 12.89 * GIGA, 0.97 * GIGA, 4.82 * GIGA
READ, WRITE = 2 * GIGA, 1 * GIGA  # the SSD's own rates
PREFILL, DECODE = 21.24 * TERA, 4.3 * TERA
GPU_ATTENTION = {"prefill": 9.97 * TERA, "decode": 0.079 * TERA}
CPU_ATTENTION = 0.0123 * TERA
GPU_MEMORY = 240 * GIGA  # three quarters of the T4's 320 GB/s
ELEMENTWISE, UNPACK = 120 * GIGA, 10  # bytes/s of unfused kernels that broadcast; bytes a weight of FlexGen's unpacking
CPU_MEMORY = 40 * GIGA
ROWS = 2000


@dataclass(frozen=True)
class Published:
    """One published run: micro-batch x count, the shares of weights as realised, where the cache is, tok/s."""

    model: str
    bits: int
    batch: int
    count: int
    on_gpu: float
    on_cpu: float
    cache: str
    rate: float


RUNS = (
    Published("opt-6.7b", 16, 2, 1, 1.0, 0.0, "gpu", 25.26),
    Published("opt-30b", 16, 48, 3, 0.082, 0.918, "cpu", 7.32),
    Published("opt-175b", 16, 32, 8, 0.0, 0.5, "disk", 0.69),
    Published("opt-175b", 4, 48, 3, 0.0, 1.0, "cpu", 1.12),
)


def load(name: str) -> tuple[ModelSize, list[UnitSize]]:
    """Sizes of a packaged OPT, and its units."""
    shape = locate(name, dummy=True).shape
    table = family_of(shape).table(shape)
    size, last = model_size(shape, table), len(table.groups) - 1
    key = "model.decoder.embed_tokens.weight"
    elements = shape.vocab_size * shape.embed_dim
    units = [UnitSize(key, (0, last), elements * 2, elements, True, True)]
    for index, group in enumerate(table.layers, 1):
        for linear in group.linears:
            elements = linear.in_features * linear.out_features
            units.append(UnitSize(f"{group.prefix}{linear.name}", (index,), elements * 2, elements, False))
    return size, units


def replay(run: Published, prompt: int, new: int) -> float:
    """Tokens a second of FlexGen's schedule: every (layer, micro-batch) ends with a synchronisation of everything.

    The next layer's weights are loaded during the first micro-batch only; hidden states are copied on the compute
    stream; attention on the CPU is part of the computation that the others wait for.
    """
    size, _ = load(run.model)
    width, layers = size.shape.hidden_size, size.shape.num_layers
    elements = size.groups[1].elements
    weights = packed_bytes(elements) if run.bits == 4 else 2 * elements
    up = (1 - run.on_gpu) * weights / UP
    from_disk = (1 - run.on_gpu - run.on_cpu) * weights / READ
    row = size.kv_row_bytes("float16", run.bits)
    on_cpu = run.cache != "gpu" and run.bits == 16

    def layer(tokens: int, context: float, *, prefill: bool) -> float:
        """Seconds of one layer for the whole block: ``tokens`` and ``context`` are a sequence's."""
        flops = 2 * elements * run.batch * tokens
        compute = max(flops / (PREFILL if prefill else DECODE), 2 * elements / GPU_MEMORY)
        pairs = run.batch * (tokens * tokens / 2 if prefill else context)
        attention = 4 * width * pairs
        kind = "prefill" if prefill else "decode"
        aside = on_cpu and not prefill
        compute += attention / (CPU_ATTENTION if aside else GPU_ATTENTION[kind])
        if run.cache != "gpu":
            compute += 2 * run.batch * tokens * width * 2 / DOWN_HIDDEN
        if run.bits == 4:
            compute += UNPACK * elements / ELEMENTWISE
            compute += UNPACK * 2 * width * run.batch * (tokens if prefill else context) / ELEMENTWISE
        cache_in = 0.0 if prefill or run.cache == "gpu" else run.batch * context * row
        cache_out = 0.0 if run.cache == "gpu" else run.batch * tokens * row
        reading = cache_in / READ if run.cache == "disk" else 0.0
        writing = cache_out / WRITE if run.cache == "disk" else 0.0
        lifting = 0.0 if on_cpu else cache_in / UP
        others = max(compute, cache_out / DOWN_CACHE)
        first = max(others, up + lifting, from_disk + reading + writing)
        return first + (run.count - 1) * max(others, lifting, reading + writing)

    opening = layers * layer(prompt, 0, prefill=True)
    each = layers * layer(1, prompt + new / 2, prefill=False)
    return run.batch * run.count * new / (opening + (new - 1) * each)


def t4(attention: float) -> HardwareProfile:
    """FlexGen's machine: its product rates, the SSD's own, and attention on the CPU at ``attention`` bytes/s.

    At 12.3e9 the FLOPs are bounded as FlexGen's fit has it, too.
    """
    slow = attention < CPU_MEMORY
    ridge = round(PREFILL / GPU_MEMORY)  # rows from which on a product of 16-bit weights is bound by FLOPs
    curve = Curve(((1, GPU_MEMORY), (ridge, PREFILL)))
    gpu = Processor({"float16": curve}, {"int4": GPU_MEMORY / 2.56}, GPU_MEMORY, GPU_ATTENTION["prefill"], 2e-5)
    cpu = Processor({"float32": Curve(((1, 5e11),))}, {}, attention, CPU_ATTENTION if slow else 0.6 * TERA, 2e-5)
    links = {"h2d": UP, "d2h": UP, "disk_read": READ, "disk_write": WRITE}
    return HardwareProfile("T4", {}, links, cpu, gpu)


def bound(size: ModelSize, prompt: int, new: int) -> float:
    """Tokens a second if nothing but products at the prefill rate took time."""
    return PREFILL * new / size.linear_flops(prompt + new - 1, new)


def main() -> None:
    """Print both tables."""
    print("| run | published tok/s | replayed | difference |\n| --- | --- | --- | --- |")
    for run in RUNS:
        found = replay(run, 512, 32)
        print(f"| {run.model} {run.bits} bit | {run.rate} | {found:.2f} | {found / run.rate - 1:+.0%} |")
    print("\n| job | bits | CPU attention | bound | planned tok/s | of bound | in flight | sweep s | busiest |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    machine = Machine("gpu", int(15e9), int(200e9), int(1.4e12), "float16")
    for name, prompt, new in (
        ("opt-6.7b", 512, 32), ("opt-30b", 512, 32), ("opt-175b", 512, 32), ("opt-175b", 128, 128),
    ):  # fmt: skip
        size, units = load(name)
        limit = bound(size, prompt, new)
        for bits in (16, 4):
            for attention in (CPU_ATTENTION, CPU_MEMORY):
                options = EngineOptions(weight_bits=4 if bits == 4 else 16, kv_bits=4 if bits == 4 else 16)
                plan, _ = choose(
                    name, size, units, Workload.uniform(prompt, new, ROWS), options, machine, t4(attention),
                    stored_dtype="float16",
                )  # fmt: skip
                rate, sweep = plan.predicted["steady_tok_s"], plan.predicted["sweep_s"]
                label = "12.3 GFLOP/s" if attention == CPU_ATTENTION else "40 GB/s"
                print(
                    f"| {name} {prompt}+{new} | {bits} | {label} | {limit:.1f} | {rate:.2f} | {rate / limit:.0%} "
                    f"| {plan.max_sequences} | {sweep:.1f} | {plan.predicted['bottleneck']} |"
                )


if __name__ == "__main__":
    main()
