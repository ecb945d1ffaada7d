"""Simulates a candidate's steady sweep Step by Step and writes the Plan with what is predicted of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexbatch.policy.candidates import Candidate, Shop
from flexbatch.policy.cost import Traffic, Way
from flexbatch.policy.job import Setting, job_seconds, steady_seconds, sweep_busy
from flexbatch.policy.machine import LANES
from flexbatch.policy.plan import Plan
from flexbatch.policy.sample import steady_sweep
from flexbatch.policy.simulator import Simulator, SweepTiming, simulate
from flexbatch.policy.steady import STAGED, TIER_OF
from flexbatch.policy.weights import WeightPlacement, least_ring
from flexbatch.scheduler.lowering import Lowerer, Routes
from flexbatch.units import Shares

_LAYERS = 12  # enough for a rhythm
_FEWEST_LAYERS = 3
_FEW_STEPS = 1000
_OF_EACH = 5
_MOST_STEPS = 12_000  # of a sweep; beyond it the sum over resources is what is predicted


@dataclass(frozen=True, slots=True)
class Estimate:
    """A candidate with what simulated sweeps of its first layers say.

    ``stretch``: how many times the sum over its busiest resource a sweep takes. ``throughput`` is the whole job's.
    """

    candidate: Candidate
    stretch: float
    sweep_s: float
    throughput: float


def finalists(shop: Shop, candidates: Sequence[Candidate], equal: float) -> list[Estimate]:
    """Estimates of those with the highest rate by sums over resources, the best of every kind of choice among them.

    A sweep never takes less than its busiest resource: candidates whose job, by that, stays below ``equal`` of the best
    estimate are not simulated.
    """

    def rate(candidate: Candidate) -> float:
        return candidate.setting.sequences / max(1e-12, steady_seconds(candidate.setting))

    firsts: dict[tuple[tuple[Way, ...], bool], int] = defaultdict(int)
    chosen: list[tuple[float, Candidate]] = []
    for candidate in sorted(candidates, key=rate, reverse=True):
        kind = candidate.choice.kind
        firsts[kind] += 1
        if firsts[kind] <= _OF_EACH:
            chosen.append((_job_rate(candidate), candidate))
    found: list[Estimate] = []
    best = 0.0
    for limit, candidate in sorted(chosen, key=lambda pair: pair[0], reverse=True):
        if limit < equal * best:
            break
        found.append(estimate(shop, candidate, limit))
        best = max(best, found[-1].throughput)
    return found


def _job_rate(candidate: Candidate) -> float:
    """Tokens a second of the job, if every sweep takes as long as its busiest resource."""
    mean = candidate.setting.mean
    return mean.tokens * mean.sweeps * mean.rows / max(1e-12, job_seconds(candidate.setting))


def estimate(shop: Shop, candidate: Candidate, limit: float) -> Estimate:
    """Simulate a few layers of a candidate's steady sweep, whose job makes ``limit`` tokens a second at best."""
    setting = candidate.setting
    cut, mean = candidate.choice.cut, setting.mean
    batches = setting.sequences * (mean.decode.tokens + mean.prompt.tokens) / cut.micro_tokens
    if any(way != "gpu" for way in setting.ways):
        batches = max(batches, setting.sequences * mean.pages / cut.staged_pages)
    layers = max(_FEWEST_LAYERS, min(_LAYERS, int(_FEW_STEPS / max(1.0, batches))))
    timing = simulated(shop, candidate, layers=min(layers, shop.size.shape.num_layers))
    stretch = 1.0 if timing is None else _stretch(setting, timing)
    return Estimate(candidate, stretch, stretch * steady_seconds(setting), limit / stretch)


def plan_of(shop: Shop, found: Estimate) -> tuple[Plan, WeightPlacement]:
    """The Plan. A whole sweep, simulated Step by Step, says how much longer sweeps take than their busiest resource.

    How long that is busy comes from means: the sweep that is simulated has whole rows, a few tokens more or less.
    """
    candidate, setting = found.candidate, found.candidate.setting
    timing = simulated(shop, candidate)
    resource_s = sweep_busy(setting, setting.sequences * setting.mean.decode.decoding, setting.steady_prompt)
    stretch = found.stretch if timing is None else _stretch(setting, timing)
    seconds = stretch * steady_seconds(setting)
    whole = stretch * job_seconds(setting)
    tokens = setting.mean.tokens * setting.mean.sweeps * setting.mean.rows
    predicted = {
        "throughput_tok_s": tokens / max(whole, 1e-12),
        "sweep_s": seconds,
        "bottleneck": max(resource_s, key=lambda name: resource_s[name]),
        "resource_s": {name: resource_s[name] for name in sorted(resource_s)},
        "job_s": whole,
        "steady_tok_s": setting.sequences * setting.mean.tokens / max(seconds, 1e-12),
    }
    return _plan(shop, candidate, predicted), candidate.placement


def _stretch(setting: Setting, timing: SweepTiming) -> float:
    """A simulated sweep's seconds over those of its busiest resource, or of all without overlap."""
    least = max(timing.busy_s.values()) if setting.overlap else sum(timing.busy_s.values())
    return max(1.0, timing.seconds / least) if least > 0 else 1.0


def routes_of(weights: Traffic, placement: WeightPlacement, num_layers: int, compute: str) -> Routes:
    """How bytes travel in a run whose weights are placed so."""
    reads = {group: math.ceil(nbytes) for group, nbytes in sorted(weights.read.items()) if nbytes}
    uploads = {group: math.ceil(nbytes) for group, nbytes in sorted(weights.uploaded.items()) if nbytes}
    return Routes(
        num_layers=num_layers,
        compute="gpu" if compute == "gpu" else "cpu",
        reads=reads,
        uploads=uploads,
        host_ring=max(placement.host_ring, least_ring(reads)),
        gpu_ring=max(placement.gpu_ring, least_ring(uploads)),
        gather=None if weights.gather is None else "cpu",
        lanes=LANES,
    )


def simulated(
    shop: Shop,
    candidate: Candidate,
    *,
    layers: int | None = None,
    keep: Simulator | None = None,
    most: int = _MOST_STEPS,
) -> SweepTiming | None:
    """The second of two simulated sweeps, whose first weights the first has fetched; None if over ``most`` Steps.

    ``layers``: only the first few, each with the weights of a mean one. A block has sweeps of two kinds; the mean of
    those with prompts and those of decoding is given.
    """
    setting, cut = candidate.setting, candidate.choice.cut
    simulator = keep or Simulator(overlap=shop.options.overlap, keep=False)
    number = layers or shop.size.shape.num_layers
    cost = setting.cost if layers is None else setting.cost.shortened(layers)
    weights = setting.weights if layers is None else setting.weights.shortened(shop.size.shape.num_layers, layers)
    lowerer = Lowerer(routes_of(weights, candidate.placement, number, shop.machine.compute))

    def sweep(place: int, *, decoding: bool, prompts: bool, prompt_tokens: float | None = None) -> SweepTiming | None:
        made = steady_sweep(
            shop.workload,
            cut,
            setting.ways,
            candidate.choice.hidden,
            setting.sequences,
            decoding=decoding,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            on_gpu=shop.machine.compute == "gpu",
            max_positions=shop.size.shape.max_positions,
            number=place,
        )
        # So few rows, or so short ones, that the mean sweep rounds to none.
        if not made.micro_batches or len(made.micro_batches) * number * 5 > most:
            return None
        return simulate(lowerer, simulator, made, cost, weights)

    if not cut.block:
        first = sweep(1, decoding=True, prompts=True)
        return first and sweep(2, decoding=True, prompts=True)
    prompts = setting.sequences * shop.workload.prompt_len
    openings = math.ceil(prompts / cut.prompt_tokens)
    opening = sweep(1, decoding=False, prompts=True, prompt_tokens=prompts / openings)
    following = opening and sweep(2, decoding=True, prompts=False)
    if opening is None or following is None:
        return None
    part = openings / (openings + setting.mean.sweeps - 1)
    names = {*opening.busy_s, *following.busy_s}
    busy = {name: part * opening.busy_s.get(name, 0.0) + (1 - part) * following.busy_s.get(name, 0.0) for name in names}
    return SweepTiming(0.0, part * opening.seconds + (1 - part) * following.seconds, busy)


def _plan(shop: Shop, candidate: Candidate, predicted: dict[str, Any]) -> Plan:
    choice, setting, cut = candidate.choice, candidate.setting, candidate.choice.cut
    pages, placement = candidate.pages, candidate.placement
    total = max(1, sum(pages.values()))
    gpu, cpu = pages.get("gpu", 0) / total, pages.get("cpu", 0) / total
    kv = Shares(gpu, cpu, max(0.0, 1 - gpu - cpu) if pages.get("disk") else 0.0) if pages else choice.hidden
    on_gpu = shop.machine.compute == "gpu"
    streams = sum(part for way, part in setting.ways.items() if way in ("cpu_up", "disk_up"))
    below = sum(part for way, part in setting.ways.items() if way != "gpu")
    return Plan(
        model=shop.name,
        hardware=shop.profile.name,
        prompt_len=shop.workload.prompt_len,
        gen_len=shop.workload.gen_len,
        num_requests=shop.workload.num_requests,
        weights=placement.shares,
        kv=kv,
        hidden=choice.hidden,
        cpu_attention=max(0.0, below - streams),
        weight_bits=choice.weight_bits,
        kv_bits=choice.precision.kv_bits,
        micro_batch_tokens=max(1, cut.micro_tokens),
        max_sequences=setting.sequences,
        dtype=choice.precision.dtype,
        weights_dtype=choice.precision.held,
        page_tokens=cut.page_tokens,
        kv_pages=pages,
        prompt_tokens_per_sweep=cut.prompt_tokens,
        micro_batch_sequences=max(1, cut.micro_sequences),
        logit_rows=cut.logit_rows,
        staged_pages={
            TIER_OF[way]: cut.staged_pages for way in choice.ways if way in STAGED or (on_gpu and way != "gpu")
        },
        gpu_attention=streams / below if on_gpu and below else None,
        host_ring=placement.host_ring,
        gpu_ring=placement.gpu_ring,
        schedule=shop.options.schedule,
        overlap=shop.options.overlap,
        memory=candidate.memory,
        predicted=predicted,
    )
