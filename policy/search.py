"""Chooses a Plan: one linear program a discrete choice, the best few realised to the byte, simulated, and compared.

Pure: sizes, a job and a machine's figures in, a Plan out. How rows and coefficients come about is in ``steady``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexbatch.errors import UsageError
from flexbatch.options import EngineOptions
from flexbatch.policy.candidates import Candidate, Shop, realise
from flexbatch.policy.cost import Precision, Way
from flexbatch.policy.footprint import DTYPE_BYTES, ModelSize, UnitSize
from flexbatch.policy.memory import cut_for
from flexbatch.policy.misfit import does_not_fit
from flexbatch.policy.placement import Machine
from flexbatch.policy.plan import Plan
from flexbatch.policy.profile import HardwareProfile
from flexbatch.policy.program import Solution, solve
from flexbatch.policy.steady import Choice
from flexbatch.policy.verdict import predict
from flexbatch.policy.weights import WeightPlacement
from flexbatch.policy.workload import Workload
from flexbatch.units import Shares

BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_BLOCK_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_LEAST_PROMPTS = 2048  # prompt tokens that a sweep may take in at once, at least
_REALISED = 4
_SIMULATED = 3
_EQUAL = 0.99  # plans within one percent are equal; the one with the smallest sweep is taken


def choose(
    name: str,
    size: ModelSize,
    units: Sequence[UnitSize],
    workload: Workload,
    options: EngineOptions,
    machine: Machine,
    profile: HardwareProfile,
    *,
    stored_dtype: str,
) -> tuple[Plan, WeightPlacement]:
    """Return the Plan with the highest predicted throughput of the job, and where each unit of weights rests.

    What ``options`` fix is a constraint. Among plans within 1% of the best, the one with the smallest sweep is taken.
    Raises DoesNotFitError, with tier, missing bytes and the cheapest remedy, if not even one row fits; UsageError if
    ``options`` ask for a tier that the device has not.
    """
    check_options(options, machine)
    shop = Shop(name, size, tuple(units), workload, options, machine, profile, stored_dtype)
    ranked = ranking(shop)
    candidates = _candidates(shop, ranked)
    if not candidates:
        raise does_not_fit(shop, list(_choices(shop, machine.compute)))
    candidates.sort(key=lambda candidate: -candidate.throughput)
    judged = [predict(shop, candidate) for candidate in candidates[:_SIMULATED]]
    best = max(plan.predicted["throughput_tok_s"] for plan, _ in judged)
    equal = [found for found in judged if found[0].predicted["throughput_tok_s"] >= _EQUAL * best]
    return min(equal, key=lambda found: found[0].predicted["sweep_s"])


def check_options(options: EngineOptions, machine: Machine) -> None:
    """Raise UsageError if ``options`` ask for what the device has not."""
    asked = {"--weights": options.weights, "--kv": options.kv, "--hidden": options.hidden}
    for option, shares in asked.items():
        if shares is not None and shares.gpu and machine.compute != "gpu":
            raise UsageError(f"{option}: this device has no GPU, so its gpu share must be 0: use e.g. 0,100,0")


@dataclass(frozen=True, slots=True)
class Ranked:
    """A choice with the optimum of its program."""

    choice: Choice
    solution: Solution


def ranking(shop: Shop) -> list[Ranked]:
    """The optimum of every choice that has one, best first."""
    compute = shop.machine.compute
    ranked = _solved(shop, _choices(shop, compute))
    scarce = not ranked or any(found.solution.prices.get(compute, 0.0) > 0 for found in ranked[:1])
    if scarce and shop.options.weights is None:
        for edges in ("cpu", "disk") if compute == "gpu" else ("disk",):
            ranked += _solved(shop, _choices(shop, edges))
    if shop.options.kv is None and (not ranked or max(found.solution.prices.get("cpu", 0.0) for found in ranked) > 0):
        ranked += _solved(shop, _choices(shop, compute, disk=True))
    return sorted(ranked, key=lambda found: -found.solution.rate)


def _solved(shop: Shop, choices: Iterator[Choice]) -> list[Ranked]:
    found = []
    for choice in choices:
        solution = solve(shop.problem(choice))
        if solution is not None:
            found.append(Ranked(choice, solution))
    return found


def _choices(shop: Shop, edges: str, *, disk: bool = False) -> Iterator[Choice]:
    """All combinations of what is enumerated, with embedding and head on ``edges``; ``disk``: some KV there, too."""
    options, machine = shop.options, shop.machine
    block = options.schedule == "block"
    sizes = batch_sizes(options)
    for precision, bits in _precisions(shop):
        for ways in _ways(options, machine, disk=disk):
            on_disk = any(way in ("disk", "disk_up") for way in ways)
            for index, rows in enumerate(sizes):
                micro = rows if options.micro_batch is None else options.micro_batch
                cut = cut_for(
                    shop.size,
                    precision,
                    shop.workload,
                    machine,
                    block=block,
                    micro_batch=micro,
                    prompt_tokens=max(micro, _LEAST_PROMPTS),
                    on_disk=on_disk,
                )
                least = 0 if index == 0 or block else rows
                hidden = options.hidden or everything_on(machine.compute)
                yield Choice(precision, bits, cut, rows, least, ways, edges, hidden)


def batch_sizes(options: EngineOptions) -> list[int]:
    """Rows that may share a product: powers of two, up to what was asked for."""
    known = _BLOCK_BATCHES if options.schedule == "block" else BATCHES
    most = options.micro_batch
    if most is None:
        return list(known)
    return [most] if options.schedule == "block" else sorted({*(rows for rows in known if rows < most), most})


def everything_on(tier: str) -> Shares:
    """All of a thing on one tier."""
    return Shares(float(tier == "gpu"), float(tier == "cpu"), float(tier == "disk"))


def _precisions(shop: Shop) -> Iterator[tuple[Precision, int]]:
    """Types to try: bits as asked for (None: both), and on a CPU weights in RAM as stored, or widened once."""
    options, dtype, stored = shop.options, shop.machine.dtype, shop.stored_dtype
    for kv_bits in (16, 4) if options.kv_bits is None else (options.kv_bits,):
        for bits in (16, 4) if options.weight_bits is None else (options.weight_bits,):
            rests = "int4" if bits == 4 else stored
            held = [rests]
            if bits == 16 and shop.machine.compute == "cpu" and DTYPE_BYTES[dtype] > DTYPE_BYTES[stored]:
                held.insert(0, dtype)
            for kept in held:
                yield Precision(dtype, rests, stored, kept, kv_bits), bits


def _ways(options: EngineOptions, machine: Machine, *, disk: bool) -> list[tuple[Way, ...]]:
    """Where KV may be and where it is attended to: a run does one or the other with all KV below the GPU."""
    if machine.compute == "cpu":
        sets: list[tuple[Way, ...]] = [("cpu", "disk")]
    else:
        here: tuple[Way, ...] = ("gpu", "cpu", "disk")
        up: tuple[Way, ...] = ("gpu", "cpu_up", "disk_up")
        sets = [here, up] if options.cpu_attention is None else [here] if options.cpu_attention else [up]
    if options.kv is not None:
        shares = {"gpu": options.kv.gpu, "cpu": options.kv.cpu, "disk": options.kv.disk}
        given = [tuple(way for way in ways if shares[way.removesuffix("_up")] > 0) for ways in sets]
        return list(dict.fromkeys(given))
    if not disk:
        sets = [tuple(way for way in ways if not way.startswith("disk")) for ways in sets]
        if machine.compute == "gpu":
            sets.append(("gpu",))
    return sets


def _candidates(shop: Shop, ranked: Sequence[Ranked]) -> list[Candidate]:
    """The best few choices, made whole: weights dealt out, pages counted, and accepted by the account of memory."""
    found: list[Candidate] = []
    for tried, entry in enumerate(ranked):
        if tried >= _REALISED and (found or tried >= 4 * _REALISED):
            break
        found += realise(shop, entry.choice, ranked[0].solution.rate * _EQUAL)
    return found
