"""Makes a choice whole: deals weights out, counts sequences and pages, and accepts it only if every byte fits.

Knows no Steps; how good a candidate is in time it asks of ``job``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from flexbatch.options import EngineOptions, Resource
from flexbatch.policy.cost import Cost, Precision, Way, traffic
from flexbatch.policy.footprint import ModelSize, UnitSize
from flexbatch.policy.job import Setting, job_seconds
from flexbatch.policy.memory import account, sized
from flexbatch.policy.placement import Machine
from flexbatch.policy.plan import TierMemory
from flexbatch.policy.profile import HardwareProfile
from flexbatch.policy.program import Problem, Solution, solve
from flexbatch.policy.steady import TIER_OF, Bounds, Choice, kv_name, steady_state
from flexbatch.policy.weights import WeightPlacement, deal
from flexbatch.policy.workload import Mean, Workload
from flexbatch.units import Shares

_ATTEMPTS = 6
_LEAST_PACE = 256  # prompt tokens a sweep: products of fewer rows than this run below their best rate


@dataclass(slots=True)
class Shop:
    """Everything a search starts from, and what it needs again and again."""

    name: str
    size: ModelSize
    units: tuple[UnitSize, ...]
    workload: Workload
    options: EngineOptions
    machine: Machine
    profile: HardwareProfile
    stored_dtype: str
    _costs: dict[tuple[Precision, int, int], Cost] = field(default_factory=dict)
    _means: dict[int, Mean] = field(default_factory=dict)
    _sized: dict[int, list[UnitSize]] = field(default_factory=dict)
    _given: dict[int, WeightPlacement] = field(default_factory=dict)

    def cost(self, choice: Choice) -> Cost:
        """The cost of Steps under ``choice``."""
        key = (choice.precision, choice.cut.page_tokens, choice.cut.logit_rows)
        if key not in self._costs:
            compute: Resource = "gpu" if self.machine.compute == "gpu" else "cpu"
            self._costs[key] = Cost(
                self.size, key[0], self.profile, compute=compute, page_tokens=key[1], logit_rows=key[2]
            )
        return self._costs[key]

    def mean(self, choice: Choice) -> Mean:
        """The job's mean, in pages of ``choice``."""
        tokens = choice.cut.page_tokens
        if tokens not in self._means:
            windows = self.cost(choice).windows
            self._means[tokens] = self.workload.mean(
                self.size.shape.max_positions, tokens, windows, block=choice.cut.block
            )
        return self._means[tokens]

    def resized(self, choice: Choice) -> list[UnitSize]:
        """The units as they rest under ``choice``."""
        bits = choice.weight_bits
        if bits not in self._sized:
            self._sized[bits] = sized(self.units, bits)
        return self._sized[bits]

    def given(self, choice: Choice) -> WeightPlacement | None:
        """Where the options' shares of weights put them, if there are any."""
        if self.options.weights is None:
            return None
        bits = choice.weight_bits
        if bits not in self._given:
            self._given[bits] = deal(self.resized(choice), self.options.weights, compute=self.machine.compute)
        return self._given[bits]

    def problem(
        self, choice: Choice, *, placement: WeightPlacement | None = None, machine: Machine | None = None
    ) -> Problem:
        """The program of ``choice``, of weights that stand as ``placement`` or the options say, else to be placed."""
        return steady_state(
            choice,
            self.cost(choice),
            self.resized(choice),
            self.mean(choice),
            machine or self.machine,
            Bounds(max(1, self.workload.num_requests), self.options.max_sequences, self.options.kv),
            placement or self.given(choice),
        )

    def memory(
        self, choice: Choice, placement: WeightPlacement, pages: Mapping[str, int], sequences: int
    ) -> dict[str, TierMemory]:
        """The account of a candidate."""
        return account(
            self.cost(choice),
            self.machine,
            choice.cut,
            self.resized(choice),
            placement,
            choice.hidden,
            pages,
            sequences,
            streamed=any(way in ("cpu_up", "disk_up") for way in choice.ways),
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan to be: all that a Plan holds but its prediction. ``setting`` describes it to ``job``."""

    choice: Choice
    placement: WeightPlacement
    pages: Mapping[str, int]
    memory: Mapping[str, TierMemory]
    setting: Setting
    throughput: float


def realise(shop: Shop, choice: Choice, good: float) -> list[Candidate]:
    """The candidates of one choice: its best block, the smallest sweep of at least the rate ``good``, and paces."""
    placement = placed(shop, choice)
    if placement is None:
        return []
    problem = shop.problem(choice, placement=placement)
    best = solve(problem)
    if best is None:
        return []
    solutions = [best]
    small = solve(problem, at_least=min(good, 0.99 * best.rate))
    if small is not None:
        solutions.append(small)
    found: dict[tuple[int, int], Candidate] = {}
    for solution in solutions:
        for candidate in _whole(shop, choice, placement, solution):
            key = (candidate.setting.sequences, candidate.setting.prompt_tokens)
            if key not in found or found[key].throughput < candidate.throughput:
                found[key] = candidate
    return list(found.values())


def placed(shop: Shop, choice: Choice, machine: Machine | None = None) -> WeightPlacement | None:
    """Deal the weights out as the program says; where whole tensors take more than shares, with smaller budgets."""
    machine = machine or shop.machine
    given = shop.given(choice)
    if given is not None:
        return given
    tried = machine
    for _ in range(_ATTEMPTS):
        solution = solve(shop.problem(choice, machine=tried))
        if solution is None:
            return None
        shares = {tier: solution.values.get(f"weights_{tier}", 0.0) for tier in ("gpu", "cpu", "disk")}
        placement = deal(shop.resized(choice), _shares(shares), compute=machine.compute, edges=choice.edges)
        fixed = shop.problem(choice, placement=placement, machine=machine)
        again = solve(fixed)
        if again is not None and again.rate >= 0.9 * solution.rate:
            return placement
        over = {
            tier: max(0.0, fixed.limits[tier].at(solution.values))
            for tier in ("gpu", "cpu", "disk")
            if tier in fixed.limits
        }
        if not any(over.values()):
            return placement if again is not None else None
        for tier, excess in over.items():
            tried = tried.with_budget(tier, max(0, math.floor(tried.budget(tier) - excess)))
    return placement if again is not None else None


def _shares(parts: Mapping[str, float]) -> Shares:
    total = sum(parts.values())
    gpu, cpu = parts["gpu"] / total, parts["cpu"] / total
    gpu, cpu = (0.0 if gpu < 1e-6 else gpu), (0.0 if cpu < 1e-6 else cpu)
    if gpu > 1 - 1e-6 or cpu > 1 - 1e-6:
        return Shares(round(gpu), round(cpu), 0)
    disk = max(0.0, 1 - gpu - cpu)
    return Shares(gpu, 1 - gpu, 0) if disk < 1e-6 else Shares(gpu, cpu, disk)


def _whole(shop: Shop, choice: Choice, placement: WeightPlacement, solution: Solution) -> Iterator[Candidate]:
    """Whole sequences and pages, once for every pace of prompts; nothing if memory has no room for them."""
    mean = shop.mean(choice)
    parts = {way: solution.values.get(kv_name(way), 0.0) for way in choice.ways}
    total = sum(parts.values())
    if total <= 0:
        return
    used: tuple[Way, ...] = tuple(way for way in choice.ways if parts[way] > 1e-3 * total)
    ways = {way: parts[way] / sum(parts[other] for other in used) for way in used}
    sequences = max(1, math.floor(total + 1e-6))
    for pace in _paces(choice, mean, sequences):
        own = replace(choice, ways=used, cut=replace(choice.cut, prompt_tokens=pace))
        pages = pages_of(shop, own, placement, ways, sequences)
        if pages is None:
            continue
        memory = shop.memory(own, placement, pages, sequences)
        if any(used_bytes.total > used_bytes.budget for used_bytes in memory.values()):
            continue
        last = len(shop.size.groups) - 1
        setting = Setting(
            choice=own,
            cost=shop.cost(own),
            weights=traffic(shop.resized(own), placement.tiers, own.precision, shop.machine.compute, last),
            mean=mean,
            ways=ways,
            sequences=sequences,
            prompt_tokens=pace,
            pages=sum(pages.values()),
            overlap=shop.options.overlap,
        )
        tokens = mean.tokens * mean.sweeps * mean.rows
        yield Candidate(own, placement, pages, memory, setting, tokens / max(1e-12, job_seconds(setting)))


def _paces(choice: Choice, mean: Mean, sequences: int) -> list[int]:
    """Prompt tokens that a sweep may take in: as fast as rows end, so that sweeps are alike, or as fast as may be."""
    wide = choice.cut.prompt_tokens
    if choice.cut.block:
        return sorted({wide, max(wide, math.ceil(sequences * mean.prompt.tokens * mean.sweeps))})
    steady = max(_LEAST_PACE, math.ceil(sequences * mean.prompt.tokens))
    return sorted({min(steady, wide), wide, max(steady, wide)})


def pages_of(
    shop: Shop, choice: Choice, placement: WeightPlacement, ways: Mapping[Way, float], sequences: int
) -> dict[str, int] | None:
    """Pages of each tier in the ratio of ``ways``: all that is of use, or what memory has room for; None: too few."""
    mean = shop.mean(choice)
    shares: dict[str, float] = {}
    for way, part in ways.items():
        shares[TIER_OF[way]] = shares.get(TIER_OF[way], 0.0) + part
    page = shop.cost(choice).page_bytes * shop.size.shape.num_layers
    bare = shop.memory(choice, placement, dict.fromkeys(shares, 1), sequences)
    room = {tier: (bare[tier].budget - bare[tier].total) // page + 1 for tier in shares}
    if min(room.values()) < 1:
        return None
    total = min(room[tier] / share for tier, share in shares.items())
    total = min(total, float(sequences * choice.cut.longest_pages))
    pages = {tier: max(1, min(room[tier], math.ceil(share * total - 1e-6))) for tier, share in shares.items()}
    home = max(shares, key=lambda tier: shares[tier])
    pages[home] = max(pages[home], min(room[home], choice.cut.longest_pages))
    return pages if pages[home] >= choice.cut.shortest_pages and mean.pages > 0 else None
