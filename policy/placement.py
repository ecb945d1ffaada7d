"""The first, simple placement: fill the GPU, then RAM, then disk, within budgets. Pure: sizes in, a Plan out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexbatch.errors import DoesNotFitError, UsageError
from flexbatch.options import EngineOptions
from flexbatch.policy.footprint import DTYPE_BYTES, PAGE_TOKENS, ModelSize, UnitSize
from flexbatch.policy.plan import Plan, TierMemory
from flexbatch.policy.weights import GPU_SLOTS, HOST_SLOTS, WeightPlacement, deal
from flexbatch.policy.workload import Workload
from flexbatch.units import MIB, Shares, format_size

AUTO_SEQUENCES = 128  # fp32 products on a CPU are within a few percent of their best rate from here on
AUTO_MICRO_BATCH = 512
LANES = 2
_BLOCK = 4096
_LOGIT_BYTES = 64 * MIB
_LEAST_PACE = 256  # prompt tokens a sweep: products of fewer rows than this run below their best rate
_STEPS = 200  # shares are tried in steps of half a percent
_KV_PART = 0.5  # of what is left beside working memory, KV gets at most this much before weights


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan may use: the tier of the products and their type, and bytes of every tier."""

    compute: str
    gpu: int
    cpu: int
    disk: int
    dtype: str

    def budget(self, tier: str) -> int:
        """Bytes of ``tier``."""
        return {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk}[tier]

    def with_budget(self, tier: str, nbytes: int) -> Machine:
        """The same with ``nbytes`` on ``tier``."""
        budgets = {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk, tier: nbytes}
        return Machine(self.compute, budgets["gpu"], budgets["cpu"], budgets["disk"], self.dtype)


@dataclass(frozen=True, slots=True)
class _Job:
    """Sizes that do not depend on the placement."""

    dtype: str
    sequences: int
    micro_tokens: int
    micro_sequences: int
    prompt_tokens: int
    steady_tokens: int
    logit_rows: int
    page_tokens: int
    page_bytes: int  # of one layer
    useful_pages: int
    fewest_pages: int
    longest_pages: int
    working: int
    hidden: int


def place(
    name: str,
    size: ModelSize,
    units: Sequence[UnitSize],
    workload: Workload,
    options: EngineOptions,
    machine: Machine,
    *,
    stored_dtype: str,
) -> tuple[Plan, WeightPlacement]:
    """Return a Plan and where each unit of weights rests.

    Weights rest in the compute type where everything fits RAM that way; else as stored, and what does not fit goes
    one tier down. Raises DoesNotFitError, naming tier, bytes and option, if not even one row fits; UsageError if
    ``options`` ask for a tier that the device has not.
    """
    _check_tiers(options, machine)
    job = _job(size, workload, options, machine)
    beside = job.working + job.hidden
    part = 0.0 if options.weights is not None else _KV_PART
    first_room = {tier: int(part * (machine.budget(tier) - beside)) for tier in ("gpu", "cpu", "disk")}
    kv = _kv_pages(size, job, options, machine, first_room)
    placement, held = _weights(size, units, job, kv, options, machine, stored_dtype)
    memory = _memory(size, job, kv, placement, held, machine, options)
    kv = _kv_pages(
        size, job, options, machine, {tier: used.budget - used.total + used.kv for tier, used in memory.items()}
    )
    memory = _memory(size, job, kv, placement, held, machine, options)
    for tier, used in memory.items():
        missing = used.total - used.budget
        if missing > 0:
            raise DoesNotFitError(
                f"{name} needs {format_size(used.weights)} for weights, {format_size(used.kv)} for KV cache and "
                f"{format_size(used.working + used.hidden)} of working memory on the {tier} tier, which has "
                f"{format_size(used.budget)}: {format_size(missing)} are missing: raise --{tier}-memory or shorten "
                "the rows",
                tier=tier,
                missing=missing,
                remedy=f"--{tier}-memory",
            )
    block = options.schedule == "block"
    total_pages = max(1, sum(kv.values()))
    shares = Shares(kv.get("gpu", 0) / total_pages, kv.get("cpu", 0) / total_pages, _rest(kv, total_pages))
    staged = {
        tier: _staged_pages(job)
        for tier in kv
        if tier == "disk" or (machine.compute == "gpu" and tier == "cpu" and options.cpu_attention is False)
    }
    plan = Plan(
        model=name,
        hardware=machine.compute,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        num_requests=workload.num_requests,
        weights=placement.shares,
        kv=shares,
        hidden=options.hidden or _all_on(machine.compute),
        cpu_attention=0.0 if machine.compute == "gpu" and (options.cpu_attention is False) else 1.0 - shares.gpu,
        weight_bits=16,
        kv_bits=16,
        micro_batch_tokens=job.micro_tokens,
        max_sequences=job.sequences,
        dtype=job.dtype,
        weights_dtype=held,
        page_tokens=job.page_tokens,
        kv_pages=kv,
        staged_pages=staged,
        host_slots=HOST_SLOTS if placement.host_slot else 0,
        gpu_slots=GPU_SLOTS if placement.gpu_slot else 0,
        # Where a sweep moves no weights, prompts come in at the pace at which rows end, so that decoding tokens share
        # products with prompt tokens all the way; where it does, fewer sweeps are worth more.
        prompt_tokens_per_sweep=job.prompt_tokens if _streams(placement, machine) or block else job.steady_tokens,
        micro_batch_sequences=job.micro_sequences,
        logit_rows=job.logit_rows,
        schedule=options.schedule,
        overlap=options.overlap,
        memory=memory,
    )
    return plan, placement


def _check_tiers(options: EngineOptions, machine: Machine) -> None:
    asked = {"--weights": options.weights, "--kv": options.kv, "--hidden": options.hidden}
    for option, shares in asked.items():
        if shares is not None and shares.gpu and machine.compute != "gpu":
            raise UsageError(f"{option}: this device has no GPU, so its gpu share must be 0: use e.g. 0,100,0")


def _job(size: ModelSize, workload: Workload, options: EngineOptions, machine: Machine) -> _Job:
    shape = size.shape
    dtype = machine.dtype
    longest = max(1, workload.longest(shape.max_positions))
    shortest = max(1, workload.shortest(shape.max_positions))
    sequences = max(1, min(options.max_sequences or AUTO_SEQUENCES, workload.num_requests))
    block = options.schedule == "block"
    micro_sequences = (options.micro_batch if block else None) or max(1, min(sequences, 32))
    micro_tokens = (None if block else options.micro_batch) or AUTO_MICRO_BATCH
    prompt_tokens = max(micro_tokens, 4 * AUTO_MICRO_BATCH)
    steady = round(sequences * workload.prompt_len / max(1.0, workload.gen_len))
    logit_rows = max(1, min(256, _LOGIT_BYTES // (4 * shape.vocab_size)))
    page_tokens = PAGE_TOKENS
    token_bytes = 2 * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES[dtype]
    if options.kv is not None and options.kv.disk:
        while page_tokens * token_bytes % _BLOCK:
            page_tokens *= 2
    batch = micro_sequences * longest if block else micro_tokens
    return _Job(
        dtype=dtype,
        sequences=sequences,
        micro_tokens=micro_tokens,
        micro_sequences=micro_sequences,
        prompt_tokens=prompt_tokens,
        steady_tokens=max(_LEAST_PACE, min(prompt_tokens, steady)),
        logit_rows=logit_rows,
        page_tokens=page_tokens,
        page_bytes=page_tokens * token_bytes,
        useful_pages=sequences * -(-longest // page_tokens),
        fewest_pages=-(-shortest // page_tokens),
        longest_pages=-(-longest // page_tokens),
        working=size.working_bytes(batch, longest, logit_rows, dtype),
        hidden=(prompt_tokens + sequences) * size.hidden_token_bytes(dtype),
    )


def _kv_pages(
    size: ModelSize, job: _Job, options: EngineOptions, machine: Machine, room: Mapping[str, int]
) -> dict[str, int]:
    """Pages of every tier that has any, within ``room`` bytes: as the shares say, else the upper tiers first.

    Never fewer in all than the shortest row takes: what that lacks is found when memory is added up.
    """
    page = job.page_bytes * size.shape.num_layers
    if options.kv is not None:
        shares = {"gpu": options.kv.gpu, "cpu": options.kv.cpu, "disk": options.kv.disk}
        shares = {tier: share for tier, share in shares.items() if share > 0}
        total = min(int(room[tier] / (page * share)) for tier, share in shares.items())
        total = max(job.fewest_pages, min(job.useful_pages, total))
        return {tier: max(1, int(share * total)) for tier, share in shares.items()}
    pages: dict[str, int] = {}
    left = job.useful_pages
    if machine.compute == "gpu":
        on_gpu = min(left, max(0, room["gpu"] // page))
        if on_gpu >= min(job.longest_pages, left):
            pages["gpu"] = on_gpu
            left -= on_gpu
    if left > 0:
        on_cpu = min(left, max(room["cpu"] // page, job.fewest_pages))
        if not pages or on_cpu >= job.longest_pages:
            pages["cpu"] = on_cpu
    return pages


def _weights(
    size: ModelSize,
    units: Sequence[UnitSize],
    job: _Job,
    kv: Mapping[str, int],
    options: EngineOptions,
    machine: Machine,
    stored_dtype: str,
) -> tuple[WeightPlacement, str]:
    """Where weights rest, and in which type those in RAM of a CPU-only run do."""

    def fits(placement: WeightPlacement, held: str) -> bool:
        memory = _memory(size, job, kv, placement, held, machine, options)
        return all(used.total <= used.budget for used in memory.values())

    types = [stored_dtype]
    if machine.compute == "cpu" and DTYPE_BYTES[job.dtype] > DTYPE_BYTES[stored_dtype]:
        types.insert(0, job.dtype)
    if options.weights is not None:
        placement = deal(units, options.weights, compute=machine.compute)
        return placement, next((held for held in types if fits(placement, held)), stored_dtype)
    everything = deal(units, _all_on(machine.compute), compute=machine.compute)
    for held in types:
        if fits(everything, held):
            return everything, held
    if machine.compute == "gpu":
        for step in range(_STEPS - 1, -1, -1):
            share = step / _STEPS
            placement = deal(units, Shares(share, 1 - share, 0), compute="gpu", edges="gpu" if share else "cpu")
            if fits(placement, stored_dtype):
                return placement, stored_dtype
    best = everything
    for step in range(_STEPS - 1, -1, -1):
        share = step / _STEPS
        best = deal(units, Shares(0, share, 1 - share), compute=machine.compute, edges="cpu" if step else None)
        if fits(best, stored_dtype):
            break
    return best, stored_dtype


def _memory(
    size: ModelSize,
    job: _Job,
    kv: Mapping[str, int],
    placement: WeightPlacement,
    held: str,
    machine: Machine,
    options: EngineOptions,
) -> dict[str, TierMemory]:
    """What every tier holds, by use."""
    layers = size.shape.num_layers
    hidden = options.hidden or _all_on(machine.compute)
    staged = LANES * min(_staged_pages(job), sum(kv.values())) * job.page_bytes
    host_lanes = staged if kv.get("disk") else 0
    small = size.small_bytes(job.dtype)
    used: dict[str, TierMemory] = {}
    for tier, share in (("gpu", hidden.gpu), ("cpu", hidden.cpu), ("disk", hidden.disk)):
        used[tier] = TierMemory(
            kv=kv.get(tier, 0) * job.page_bytes * layers,
            hidden=int(share * job.hidden) + (layers and int(share > 0) * _BLOCK),
            budget=machine.budget(tier),
        )
    resident = placement.cpu
    if machine.compute == "cpu":
        resident = placement.cpu * DTYPE_BYTES[held] // size.stored_bytes
    in_ram = resident + HOST_SLOTS * placement.host_slot
    if machine.compute == "cpu":
        hidden_bytes = max(used["cpu"].hidden, job.hidden)
        working = job.working + host_lanes
        used["cpu"] = replace(used["cpu"], weights=in_ram + small, working=working, hidden=hidden_bytes)
    else:
        gpu_lanes = staged if options.cpu_attention is False and (kv.get("cpu") or kv.get("disk")) else 0
        used["gpu"] = replace(
            used["gpu"],
            weights=placement.gpu + GPU_SLOTS * placement.gpu_slot + small,
            working=job.working + gpu_lanes + 2 * job.micro_tokens * size.hidden_token_bytes(job.dtype),
        )
        used["cpu"] = replace(used["cpu"], weights=in_ram, working=job.working + host_lanes)
    if machine.compute == "cpu":
        used["gpu"] = TierMemory()
    return used


def _staged_pages(job: _Job) -> int:
    """Pages a travelling micro-batch brings along: eight of the longest rows, or what one micro-batch can use."""
    return max(job.longest_pages, min(8 * job.longest_pages, job.micro_tokens * job.longest_pages))


def _streams(placement: WeightPlacement, machine: Machine) -> bool:
    return placement.disk > 0 or (machine.compute == "gpu" and placement.cpu > 0)


def _all_on(tier: str) -> Shares:
    return Shares(1, 0, 0) if tier == "gpu" else Shares(0, 1, 0)


def _rest(kv: Mapping[str, int], total: int) -> float:
    return max(0.0, 1 - (kv.get("gpu", 0) + kv.get("cpu", 0)) / total)
