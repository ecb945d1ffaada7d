"""Chooses a Plan: one linear program a discrete choice, the best few realised to the byte, simulated, and compared.

Pure: sizes, a job and a machine's figures in, a Plan out. How rows and coefficients come about is in ``steady``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flexbatch.errors import DoesNotFitError, UsageError
from flexbatch.options import EngineOptions
from flexbatch.policy.candidates import Placed, Shop, Trial, realise
from flexbatch.policy.cost import Precision, Way
from flexbatch.policy.footprint import ModelSize, UnitSize
from flexbatch.policy.machine import Machine
from flexbatch.policy.memory import cut_for
from flexbatch.policy.misfit import does_not_fit
from flexbatch.policy.plan import Plan
from flexbatch.policy.profile import HardwareProfile
from flexbatch.policy.program import Solution, solve_all
from flexbatch.policy.steady import Choice
from flexbatch.policy.verdict import Estimate, finalists, plan_of
from flexbatch.policy.weights import WeightPlacement
from flexbatch.policy.workload import Workload
from flexbatch.units import Shares

BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_BLOCK_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_LEAST_PROMPTS = 2048  # prompt tokens that a sweep may take in at once, at least
_REALISED = 4
_SIMULATED = 3
_NEAR = 0.7  # of the best rate: choices of less are not looked at
_NEARLY = 0.97
_USUAL = 512  # tokens of a micro-batch
_FULL = 256  # tokens of a micro-batch from which on products run about as fast as they can
_MULTIPLES = (1, 1.5, 2, 4)  # of the smallest sweep's sequences
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
    placed: Placed | None = None,
    whole: bool = False,
) -> tuple[Plan, WeightPlacement]:
    """Return the Plan with the highest predicted throughput of the job, and where each unit of weights rests.

    What ``options`` fix is a constraint, and so are weights that are ``placed``. Among plans within 1% of the best, the
    one with the smallest sweep is taken. Where the job's mean row has no room the plan is made for its shorter rows:
    those that do not fit it fail alone. Raises DoesNotFitError, with tier, missing bytes and the cheapest remedy, if
    not even one row fits, or for ``whole`` if the mean one does not; UsageError if ``options`` ask for a tier that the
    device has not.
    """
    check_options(options, machine)
    shop = Shop(name, size, tuple(units), workload, options, machine, profile, stored_dtype, placed)
    while True:
        try:
            plan, placement = plan_of(shop, chosen(shop))
        except DoesNotFitError:
            shorter = shop.workload.shorter_half()
            if shorter is None or whole:
                raise
            shop = Shop(name, size, tuple(units), shorter, options, machine, profile, stored_dtype, placed)
        else:
            of_all = replace(
                plan,
                prompt_len=workload.prompt_len,
                gen_len=workload.gen_len,
                num_requests=workload.num_requests,
            )
            return of_all, placement


def chosen(shop: Shop) -> Estimate:
    """The candidate that becomes the Plan. Raises DoesNotFitError."""
    ranked = ranking(shop)
    candidates = realise(shop, trials_of(shop, ranked)) if ranked else []
    if not candidates:
        raise does_not_fit(shop, list(_choices(shop, shop.machine.compute)))
    estimates = finalists(shop, candidates, _EQUAL)
    best = max(estimate.throughput for estimate in estimates)
    equal = [estimate for estimate in estimates if estimate.throughput >= _EQUAL * best]
    return min(equal, key=lambda estimate: estimate.sweep_s)


def trials_of(shop: Shop, ranked: Sequence[Ranked]) -> list[Trial]:
    """Blocks to look at: of the best choices of every way of KV the smallest sweep that is as good, and larger ones."""
    trials: list[Trial] = []
    chosen = _best_choices(ranked, shop.machine.compute)
    shortest = solve_all(
        [shop.problem(found.choice).with_rate(_EQUAL * found.solution.rate) for found in chosen],
        [found.solution.sweep_s for found in chosen],
    )
    for found, small in zip(chosen, shortest, strict=True):
        least, most = sequences_of(small or found.solution), sequences_of(found.solution)
        seconds = (small or found.solution).sweep_s / least
        numbers = {min(float(round(factor * least + 0.5)), max(most, least)) for factor in _MULTIPLES}
        # The program takes products to be as fast as those of full micro-batches: a sweep should fill one.
        numbers.add(min(float(found.choice.rows), float(_most_sequences(shop))))
        trials += [Trial(found.choice, number, seconds * number, shop.machine) for number in sorted(numbers)]
        trials.append(Trial(found.choice, None, found.solution.sweep_s, shop.machine))
    return trials


def _most_sequences(shop: Shop) -> int:
    """Sequences that may ever be in flight."""
    rows = max(1, shop.workload.num_requests)
    return rows if shop.options.max_sequences is None else min(rows, shop.options.max_sequences)


def sequences_of(solution: Solution) -> float:
    """Sequences in flight."""
    return sum(value for name, value in solution.values.items() if name.startswith("sequences_"))


def _best_choices(ranked: Sequence[Ranked], compute: str) -> list[Ranked]:
    """Of every kind, the choices nearly as good as the best that ask least of products and whose size is usual."""
    chosen: list[Ranked] = []
    for kind in dict.fromkeys(found.choice.kind for found in ranked):
        own = [found for found in ranked if found.choice.kind == kind]
        if own[0].solution.rate < _NEAR * ranked[0].solution.rate:
            continue
        nearly = [found for found in own if found.solution.rate >= _NEARLY * own[0].solution.rate]
        lightest = min(nearly, key=lambda found: found.solution.busy_s.get(compute, 0.0) / sequences_of(found.solution))
        usual = min(nearly, key=lambda found: abs(math.log(found.choice.rows / _USUAL)))
        chosen += list({id(found): found for found in (lightest, usual, own[0])}.values())
    return chosen


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
    ranked = _solved(shop, list(_choices(shop, compute)))
    others: list[Choice] = []
    if not shop.fixed and _scarce(ranked, compute):
        for edges in ("cpu", "disk") if compute == "gpu" else ("disk",):
            others += _choices(shop, edges)
    if shop.options.kv is None and _scarce(ranked, "cpu"):
        others += _choices(shop, compute, disk=True)
    return sorted([*ranked, *_solved(shop, others)], key=lambda found: -found.solution.rate)


def _scarce(ranked: Sequence[Ranked], tier: str) -> bool:
    """Whether more of ``tier`` would allow more to the best choices, or nothing fits at all."""
    best = max((found.solution.rate for found in ranked), default=0.0)
    return all(found.solution.prices.get(tier, 0.0) > 0 for found in ranked if found.solution.rate >= _EQUAL * best)


def _solved(shop: Shop, choices: Sequence[Choice]) -> list[Ranked]:
    solutions = solve_all([shop.problem(choice) for choice in choices])
    return [
        Ranked(choice, solution) for choice, solution in zip(choices, solutions, strict=True) if solution is not None
    ]


def _choices(shop: Shop, edges: str, *, disk: bool = False) -> Iterator[Choice]:
    """All combinations of what is enumerated, with embedding and head on ``edges``; ``disk``: some KV there, too."""
    options, machine = shop.options, shop.machine
    block = options.schedule == "block"
    for precision, bits in _precisions(shop):
        for ways in _ways(options, machine, disk=disk):
            on_disk = any(way in ("disk", "disk_up") for way in ways)
            here = all(way == machine.compute for way in ways)
            for index, rows, micro in _cuts(options, here=here):
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


def _cuts(options: EngineOptions, *, here: bool) -> Iterator[tuple[int, int, int]]:
    """Of every size its place, the rows that share a product, and what a micro-batch holds.

    ``here``: all KV is where products run, so that no micro-batch has to wait for the attention of another.
    """
    block = options.schedule == "block"
    for index, rows in enumerate(batch_sizes(options)):
        # A sweep of up to twice as many tokens had better be one micro-batch than two.
        micro = rows if block else max(rows, min(2 * rows, _USUAL))
        micro = micro if options.micro_batch is None else options.micro_batch
        yield index, rows, micro
        if here and not block and options.micro_batch is None and 2 * micro < _FULL:
            yield index, rows, _FULL  # where few rows decode, prompts still come in by more


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
    """Types to try: bits as asked for (None: both), and on a CPU weights in RAM as stored, or converted once."""
    options, dtype, stored = shop.options, shop.machine.dtype, shop.stored_dtype
    packed = any(unit.packed for unit in shop.units)
    for kv_bits in (16, 4) if options.kv_bits is None else (options.kv_bits,):
        for bits in (16, 4) if options.weight_bits is None else (options.weight_bits,):
            held = [stored]
            if shop.machine.compute == "cpu" and dtype != stored:
                held.insert(0, dtype)
            for kept in held:
                if shop.placed is None or (kept, bits) == (shop.placed.held, shop.placed.bits):
                    yield Precision(dtype, "int4" if bits == 4 or packed else stored, stored, kept, kv_bits), bits


def _ways(options: EngineOptions, machine: Machine, *, disk: bool) -> list[tuple[Way, ...]]:
    """Where KV may be and where decoding sequences' is attended to; part here and part there only without a disk."""
    if machine.compute == "cpu":
        sets: list[tuple[Way, ...]] = [("cpu", "disk")]
    else:
        here: tuple[Way, ...] = ("gpu", "cpu", "disk")
        up: tuple[Way, ...] = ("gpu", "cpu_up", "disk_up")
        both: tuple[Way, ...] = ("gpu", "cpu", "cpu_up")
        sets = [here, up] if options.cpu_attention is None else [here] if options.cpu_attention else [up]
        if not disk and options.cpu_attention is None and (options.kv is None or not options.kv.disk):
            sets = [both]
    if options.kv is not None:
        shares = {"gpu": options.kv.gpu, "cpu": options.kv.cpu, "disk": options.kv.disk}
        given = [tuple(way for way in ways if shares[way.removesuffix("_up")] > 0) for ways in sets]
        return list(dict.fromkeys(given))
    if not disk:
        sets = [tuple(way for way in ways if not way.startswith("disk")) for ways in sets]
        if machine.compute == "gpu":
            # Rows at home in two places share no micro-batch, which the program does not see: one place alone, too.
            sets += [("gpu",), *((way,) for way in sets[0] if way.startswith("cpu") and len(sets[0]) > 1)]
    return sets
