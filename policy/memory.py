"""Counts what a plan holds on every tier, to the byte that the run will ask for, and says how a sweep is cut.

The linear program's memory rows are the linear form of ``account``; a plan is accepted by ``account`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count

from flexbatch.policy.cost import Cost, Precision
from flexbatch.policy.footprint import DTYPE_BYTES, PAGE_TOKENS, ModelSize, UnitSize, packed_bytes
from flexbatch.policy.machine import LANES, Machine
from flexbatch.policy.plan import TIERS, TierMemory
from flexbatch.policy.weights import BLOCK, WeightPlacement
from flexbatch.policy.workload import Workload
from flexbatch.units import MIB, Shares

_LOGIT_BYTES = 64 * MIB
_LANE_SHARE = 32  # a lane takes at most this part of the smallest tier it stands on
_LEAST_STAGED = 8  # rows that a lane holds even so


@dataclass(frozen=True, slots=True)
class Cut:
    """How sweeps are cut. ``longest``: tokens of KV of the longest row; ``batch_tokens``: the largest micro-batch's.

    ``prompt_tokens``: the most that a sweep takes in; ``staged_pages``: what a travelling micro-batch brings along.
    """

    block: bool
    micro_tokens: int
    micro_sequences: int
    prompt_tokens: int
    logit_rows: int
    page_tokens: int
    longest: int
    shortest: int
    staged_pages: int

    @property
    def longest_pages(self) -> int:
        """Pages of the longest row."""
        return -(-self.longest // self.page_tokens)

    @property
    def shortest_pages(self) -> int:
        """Pages of the shortest row."""
        return -(-self.shortest // self.page_tokens)

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return self.micro_sequences * self.longest if self.block else self.micro_tokens


def page_tokens_for(size: ModelSize, precision: Precision, *, on_disk: bool) -> int:
    """Tokens of a page; on disk a page is a multiple of a block."""
    tokens = PAGE_TOKENS

    def page(number: int) -> int:
        return size.kv_page_bytes(number, precision.dtype, precision.kv_bits)

    if precision.kv_bits == 4 and on_disk:
        # Few numbers of packed tokens fill blocks exactly: the first that nearly does, somewhat smaller ones included.
        likely = chain((tokens,), count(max(1, tokens - tokens // 4)))
        return next(number for number in likely if page(number) % BLOCK == 0)
    while on_disk and page(tokens) % BLOCK:
        tokens *= 2
    return tokens


def cut_for(
    size: ModelSize,
    precision: Precision,
    workload: Workload,
    machine: Machine,
    *,
    block: bool,
    micro_batch: int,
    prompt_tokens: int,
    on_disk: bool,
) -> Cut:
    """The cut with micro-batches of ``micro_batch`` tokens (``block``: sequences)."""
    shape = size.shape
    tokens = page_tokens_for(size, precision, on_disk=on_disk)
    longest = max(1, workload.longest(shape.max_positions))
    pages = -(-longest // tokens)
    page_bytes = size.kv_page_bytes(tokens, precision.dtype, precision.kv_bits)
    tiers = [machine.gpu, machine.cpu] if machine.compute == "gpu" else [machine.cpu]
    room = min(tiers) // _LANE_SHARE // page_bytes
    staged = max(pages, min(micro_batch * pages, max(room, _LEAST_STAGED * pages)))
    return Cut(
        block=block,
        micro_tokens=1 if block else micro_batch,
        micro_sequences=micro_batch if block else 1,
        prompt_tokens=prompt_tokens,
        logit_rows=max(1, min(256, _LOGIT_BYTES // (4 * shape.vocab_size))),
        page_tokens=tokens,
        longest=longest,
        shortest=max(1, workload.shortest(shape.max_positions)),
        staged_pages=staged,
    )


def sized(units: Sequence[UnitSize], weight_bits: int) -> list[UnitSize]:
    """``units`` as they rest with that many bits: in 4, layers are packed; embedding and head stay as stored."""
    if weight_bits != 4:
        return list(units)
    return [unit if unit.edge else _packed(unit) for unit in units]


def _packed(unit: UnitSize) -> UnitSize:
    nbytes = unit.packed_bytes + packed_bytes(unit.elements - unit.packed)
    return replace(unit, nbytes=nbytes, packed=unit.elements, packed_bytes=nbytes)


def resident_bytes(unit: UnitSize, tier: str, held: str, compute: str) -> int:
    """What ``unit`` takes on ``tier``: RAM of a run that computes there has it in the type ``held``.

    What is in 4 bits stays so everywhere.
    """
    if compute == "cpu" and tier == "cpu":
        return unit.packed_bytes + (unit.elements - unit.packed) * DTYPE_BYTES[held]
    return unit.nbytes


def account(
    cost: Cost,
    machine: Machine,
    cut: Cut,
    units: Sequence[UnitSize],
    placement: WeightPlacement,
    hidden: Shares,
    kv_pages: Mapping[str, int],
    sequences: int,
) -> dict[str, TierMemory]:
    """What every tier holds, by use."""
    size, dtype, compute = cost.size, cost.precision.dtype, machine.compute
    waiting = (cut.prompt_tokens + sequences) * size.hidden_token_bytes(dtype)
    weights = dict.fromkeys(TIERS, 0)
    for unit in units:
        tier = placement.tiers[unit.key]
        weights[tier] += resident_bytes(unit, tier, cost.precision.held, compute)
    small = size.small_bytes(dtype)
    stored, kv_bits = cost.precision.stored, cost.precision.kv_bits
    scratch = size.working_bytes(cut.batch_tokens, cut.longest, cut.logit_rows, dtype, stored, kv_bits)
    lanes = LANES * cut.staged_pages * cost.page_bytes
    working = {"cpu": scratch + (lanes if kv_pages.get("disk") else 0), "gpu": 0, "disk": 0}
    if compute == "gpu":
        moves = kv_pages.get("cpu") or kv_pages.get("disk")
        working["gpu"] = scratch + (lanes if moves else 0)
        working["gpu"] += 2 * cut.batch_tokens * size.hidden_token_bytes(dtype)
        weights["gpu"] += placement.gpu_ring + small
    else:
        weights["cpu"] += small
    weights["cpu"] += placement.host_ring
    shares = {"gpu": hidden.gpu, "cpu": hidden.cpu, "disk": hidden.disk}
    held = {tier: int(share * waiting) + (BLOCK if share > 0 else 0) for tier, share in shares.items()}
    if compute == "cpu":
        held["cpu"] = max(held["cpu"], waiting)
    if hidden.disk:
        working["disk"] = BLOCK * (cut.prompt_tokens + sequences + 3)
    return {
        tier: TierMemory(
            weights=weights[tier] if tier != "disk" else 0,
            kv=kv_pages.get(tier, 0) * cost.page_bytes * size.shape.num_layers,
            hidden=held[tier],
            working=working[tier],
            budget=machine.budget(tier),
        )
        if tier != "gpu" or compute == "gpu"
        else TierMemory()
        for tier in TIERS
    }
