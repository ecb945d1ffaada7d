"""A job's steady state as a linear-fractional program: which shares and how many sequences make most tokens a second.

Every coefficient comes from ``cost`` and ``memory``; how such a program is solved is in ``program``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexbatch.policy.cost import Cost, Load, Precision, Traffic, Way, traffic
from flexbatch.policy.footprint import RANGE_SLACK, UnitSize
from flexbatch.policy.machine import LANES, Machine
from flexbatch.policy.memory import Cut, resident_bytes
from flexbatch.policy.program import Problem, Row
from flexbatch.policy.weights import BLOCK, WeightPlacement
from flexbatch.policy.workload import Mean
from flexbatch.units import Shares

TIER_OF: dict[Way, str] = {"gpu": "gpu", "cpu": "cpu", "cpu_up": "cpu", "disk": "disk", "disk_up": "disk"}
STAGED: tuple[Way, ...] = ("cpu_up", "disk", "disk_up")
_UP: dict[Way, Way] = {"gpu": "gpu", "cpu": "cpu_up", "cpu_up": "cpu_up", "disk": "disk_up", "disk_up": "disk_up"}
_DECODING = 64  # rows of a product that only decoding sequences share, where prompts are attended to elsewhere


@dataclass(frozen=True, slots=True)
class Choice:
    """The discrete part of a plan: precision, micro-batch (in ``cut``), ways of KV, where embedding and head rest.

    ``rows`` tokens share a product: at most what the cut allows. ``least``: sweeps have at least that many tokens.
    """

    precision: Precision
    weight_bits: int
    cut: Cut
    rows: int
    least: int
    ways: tuple[Way, ...]
    edges: str
    hidden: Shares

    @property
    def kind(self) -> tuple[tuple[Way, ...], bool]:
        """What the best are looked at of each: the ways of KV, and whether prompts come in by more than decode."""
        return self.ways, self.cut.micro_tokens > 2 * self.rows


@dataclass(frozen=True, slots=True)
class Bounds:
    """What limits every plan of a job: rows, ``--max-sequences``, given shares of KV and of weights."""

    rows: int
    max_sequences: int | None = None
    kv: Shares | None = None
    weights_on: tuple[str, ...] = ("gpu", "cpu", "disk")


def kv_name(way: Way) -> str:
    """The variable: sequences whose KV goes that way."""
    return f"sequences_{way}"


def steady_state(
    choice: Choice,
    cost: Cost,
    units: Sequence[UnitSize],
    mean: Mean,
    machine: Machine,
    bounds: Bounds,
    placement: WeightPlacement | None = None,
) -> Problem:
    """The program of one choice. With ``placement`` the weights stand where it says; else their shares are variables.

    Variables: ``weights_TIER`` (shares of the layers' bytes), ``ring_gpu`` and ``ring_host`` (what streams
    pass through, in layers),
    ``sequences_WAY``. Times are seconds a sweep, ``disk`` is reading and writing together; limits are bytes of a tier,
    or counts.
    """
    weights = _given(placement, cost, units, machine) if placement else _free(choice, cost, units, machine, bounds)
    counts = {kv_name(way): mean.tokens for way in choice.ways}
    times: dict[str, Row] = dict(weights.times)
    for way in choice.ways:
        for resource, seconds in per_sequence(choice, cost, mean, way, weights.traffic).items():
            times[resource] = times.get(resource, Row({})) + Row({kv_name(way): seconds})
    if {"disk_read", "disk_write"} <= times.keys():
        times["disk"] = times["disk_read"] + times["disk_write"]
    limits = {**_memory(choice, cost, mean, machine, weights.memory), **weights.limits}
    everyone = dict.fromkeys(counts, 1.0)
    limits["rows"] = Row(everyone, -float(min(bounds.rows, bounds.max_sequences or bounds.rows)))
    limits["one"] = Row(dict.fromkeys(counts, -1.0), 1.0)
    if choice.least:
        tokens = mean.decode.tokens + mean.prompt.tokens
        limits["micro_batch"] = Row(dict.fromkeys(counts, -tokens), float(choice.least))
    equal = dict(weights.equal)
    if bounds.kv is not None:
        for tier, share in (("gpu", bounds.kv.gpu), ("cpu", bounds.kv.cpu), ("disk", bounds.kv.disk)):
            own = {kv_name(way): float(TIER_OF[way] == tier) - share for way in choice.ways}
            equal[f"kv_{tier}"] = Row(own)
    used = {resource: row for resource, row in times.items() if row.constant or any(row.terms.values())}
    return Problem(counts, used, limits, equal)


def per_sequence(choice: Choice, cost: Cost, mean: Mean, way: Way, weights: Traffic) -> dict[str, float]:
    """Seconds of each resource that one sequence in flight costs a sweep, its micro-batches being full."""
    spent: dict[str, float] = defaultdict(float)
    for load, rows, goes in batches(choice, mean, way, cost.compute):
        full = rows / load.tokens
        for tier, share in (("gpu", choice.hidden.gpu), ("cpu", choice.hidden.cpu), ("disk", choice.hidden.disk)):
            if share > 0:
                for resource, seconds in cost.batch_s(load.scaled(full), goes, tier, weights).items():
                    spent[resource] += share * seconds / full
    return dict(spent)


def prompt_way(way: Way, compute: str) -> Way:
    """How the KV of prompts goes: a GPU attends to them itself, for their keys and values are there."""
    return _UP[way] if compute == "gpu" else way


def mixes(way: Way, compute: str) -> bool:
    """Whether decoding rows and prompts share micro-batches."""
    return compute != "gpu" or way == "gpu"


def batches(choice: Choice, mean: Mean, way: Way, compute: str) -> list[tuple[Load, float, Way]]:
    """What one sequence asks of a sweep in parts that share micro-batches, with a full one's tokens and its KV's way.

    Where KV travels, the pages that a lane holds bound how many decoding rows come together.
    """
    cut = choice.cut
    if cut.block:
        prompt_rows = cut.micro_sequences * mean.prompt.tokens * mean.sweeps
        parts = [(mean.decode, float(cut.micro_sequences), way), (mean.prompt, prompt_rows, prompt_way(way, compute))]
    elif mixes(way, compute) and way not in STAGED:
        parts = [(mean.decode + mean.prompt, float(choice.rows), way)]
    else:
        together = max(1.0, cut.staged_pages / max(1.0, mean.pages)) if way in STAGED else float(_DECODING)
        decoding = min(float(choice.rows), together, float(_DECODING))
        parts = [(mean.decode, decoding, way), (mean.prompt, float(choice.rows), prompt_way(way, compute))]
    return [(load, rows, goes) for load, rows, goes in parts if load.tokens > 0]


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights' part of a program."""

    times: Mapping[str, Row]
    memory: Mapping[str, Row]
    limits: Mapping[str, Row]
    equal: Mapping[str, Row]
    traffic: Traffic


def _given(placement: WeightPlacement, cost: Cost, units: Sequence[UnitSize], machine: Machine) -> _Weights:
    moving = traffic(units, placement.tiers, cost.precision, machine.compute, len(cost.size.groups) - 1)
    memory = dict.fromkeys(("gpu", "cpu"), 0.0)
    for unit in units:
        tier = placement.tiers[unit.key]
        if tier != "disk":
            memory[tier] += resident_bytes(unit, tier, cost.precision.held, machine.compute)
    memory["gpu"] += placement.gpu_ring
    memory["cpu"] += placement.host_ring
    return _Weights(
        times={resource: Row({}, seconds) for resource, seconds in cost.weights_s(moving).items()},
        memory={tier: Row({}, held) for tier, held in memory.items()},
        limits={},
        equal={},
        traffic=moving,
    )


def _free(choice: Choice, cost: Cost, units: Sequence[UnitSize], machine: Machine, bounds: Bounds) -> _Weights:
    compute, last = machine.compute, len(cost.size.groups) - 1
    layers = [unit for unit in units if not unit.edge]
    edges = [unit for unit in units if unit.edge]
    total = float(sum(unit.nbytes for unit in layers))
    layer = float(sum(unit.buffer_bytes for unit in layers)) / max(1, cost.size.shape.num_layers)
    tiers = [
        tier for tier in ("gpu", "cpu", "disk") if tier in bounds.weights_on and (tier != "gpu" or compute == "gpu")
    ]
    packed = sum(unit.packed for unit in layers)
    dense = sum(unit.elements for unit in layers) - packed
    if compute == "cpu" and dense and choice.precision.held not in (choice.precision.stored, choice.precision.edges):
        tiers = ["cpu"]  # what is widened to stay in RAM pays only if all of it does
    names = {tier: f"weights_{tier}" for tier in tiers}
    held = {unit.key: choice.edges for unit in edges}
    moving = traffic(edges, held, cost.precision, compute, last)
    # Layers: what is packed is unpacked, and all else widened where it is not kept in the type of the products.
    below = choice.precision.held if compute == "cpu" else choice.precision.stored
    part = 1.0 if below != choice.precision.dtype else packed / max(1, packed + dense)
    if part:
        widened = {group: part * cost.size.groups[group].matrices for group in range(1, last)}
        moving = replace(moving, widened={**moving.widened, **widened})
        if compute == "cpu":
            moving = replace(moving, loose={**moving.loose, **widened})
    seconds = cost.weights_s(moving)
    times = {
        "disk_read": Row(
            {names["disk"]: cost.link_s("disk_read", total)} if "disk" in names else {}, seconds["disk_read"]
        )
    }
    memory: dict[str, Row] = {}
    limits: dict[str, Row] = {}
    if compute == "gpu":
        up = {names[tier]: cost.link_s("h2d", total) for tier in tiers if tier != "gpu"}
        times["h2d"] = Row(up, seconds["h2d"])
        memory["gpu"] = Row({"ring_gpu": layer, **({names["gpu"]: total} if "gpu" in names else {})})
        limits |= _ring("ring_gpu", [names[tier] for tier in tiers if tier != "gpu"], _largest(moving.uploaded) / layer)
    resident = float(sum(resident_bytes(unit, "cpu", choice.precision.held, compute) for unit in layers))
    memory["cpu"] = Row({"ring_host": layer, **({names["cpu"]: resident} if "cpu" in names else {})})
    limits |= _ring("ring_host", [names["disk"]] if "disk" in names else [], _largest(moving.read) / layer)
    if choice.edges != "disk":
        at_edges = sum(resident_bytes(unit, choice.edges, choice.precision.held, compute) for unit in edges)
        memory[choice.edges] = memory[choice.edges] + Row({}, float(at_edges))
    return _Weights(times, memory, limits, {"weights": Row(dict.fromkeys(names.values(), 1.0), -1.0)}, moving)


def _ring(name: str, streamed: Sequence[str], edge: float) -> dict[str, Row]:
    """A ring holds two layers' parts at least, or one beside the largest of the ``edge`` groups (in layers)."""
    shares = dict.fromkeys(streamed, 1.0)
    return {
        name: Row({**dict.fromkeys(streamed, 2.0), name: -1.0}),
        f"{name}_edges": Row({**(shares if edge else {}), name: -1.0}, edge),
    }


def _largest(by_group: Mapping[int, float]) -> float:
    return max(by_group.values()) + RANGE_SLACK if by_group else 0.0


def _memory(choice: Choice, cost: Cost, mean: Mean, machine: Machine, weights: Mapping[str, Row]) -> dict[str, Row]:
    """``account`` as rows: bytes of each tier beyond its budget."""
    size, cut, dtype = cost.size, choice.cut, choice.precision.dtype
    waits = size.hidden_token_bytes(dtype)
    shares = {"gpu": choice.hidden.gpu, "cpu": choice.hidden.cpu, "disk": choice.hidden.disk}
    stored, kv_bits = choice.precision.stored, choice.precision.kv_bits
    scratch = size.working_bytes(cut.batch_tokens, cut.longest, cut.logit_rows, dtype, stored, kv_bits)
    lanes = LANES * cut.staged_pages * cost.page_bytes
    fixed = {"gpu": 0.0, "cpu": float(scratch), "disk": 0.0}
    if any(TIER_OF[way] == "disk" for way in choice.ways):
        fixed["cpu"] += lanes
    if machine.compute == "gpu":
        below = any(way != "gpu" for way in choice.ways)
        fixed["gpu"] = scratch + (lanes if below else 0) + 2 * cut.batch_tokens * waits + size.small_bytes(dtype)
    else:
        fixed["cpu"] += size.small_bytes(dtype)
        shares["cpu"] = 1.0
    if shares["disk"]:
        fixed["disk"] += BLOCK * (cut.prompt_tokens + 3)
    rows: dict[str, Row] = {}
    for tier in ("gpu", "cpu", "disk") if machine.compute == "gpu" else ("cpu", "disk"):
        held = {
            kv_name(way): (mean.pages * cost.page_bytes * size.shape.num_layers if TIER_OF[way] == tier else 0.0)
            + shares[tier] * waits
            + (BLOCK if tier == "disk" and shares["disk"] else 0)
            for way in choice.ways
        }
        constant = fixed[tier] + shares[tier] * cut.prompt_tokens * waits + (BLOCK if shares[tier] else 0)
        rows[tier] = weights.get(tier, Row({})) + Row(held, constant - machine.budget(tier))
    return rows
