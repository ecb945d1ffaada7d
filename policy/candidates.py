"""Makes a choice whole: deals weights out, counts sequences and pages, and accepts it only if every byte fits.

Knows no Steps; how good a candidate is in time it asks of ``job``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flexbatch.options import EngineOptions, Resource
from flexbatch.policy.cost import Cost, Precision, Way, traffic
from flexbatch.policy.footprint import ModelSize, UnitSize
from flexbatch.policy.job import Setting
from flexbatch.policy.machine import Machine
from flexbatch.policy.memory import account, sized
from flexbatch.policy.plan import TIERS, TierMemory
from flexbatch.policy.profile import HardwareProfile
from flexbatch.policy.program import Problem, Solution, solve_all
from flexbatch.policy.steady import TIER_OF, Bounds, Choice, kv_name, steady_state
from flexbatch.policy.weights import WeightPlacement, deal, grown_ring
from flexbatch.policy.workload import Mean, Workload
from flexbatch.units import Shares

_ATTEMPTS = 6
_AS_GOOD = 0.97  # of the shares' rate: what whole tensors may cost
_SOLVER_SLACK = 1e-4  # what a solver leaves of a whole number is not a sequence less
_LEAST_PACE = 256  # prompt tokens a sweep: products of fewer rows than this run below their best rate


@dataclass(frozen=True, slots=True)
class Placed:
    """Weights that rest already, of ``bits`` and in type ``held``; ``placement`` has the rings that there are."""

    placement: WeightPlacement
    bits: int
    held: str


@dataclass(slots=True)
class Shop:
    """Everything a search starts from, and what it needs again and again. ``placed``: weights that stay there."""

    name: str
    size: ModelSize
    units: tuple[UnitSize, ...]
    workload: Workload
    options: EngineOptions
    machine: Machine
    profile: HardwareProfile
    stored_dtype: str
    placed: Placed | None = None
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

    @property
    def fixed(self) -> bool:
        """Whether it is said where weights are."""
        return self.placed is not None or self.options.weights is not None

    def given(self, choice: Choice) -> WeightPlacement | None:
        """Where weights are, or where the options' shares of them put them, if there are any."""
        if self.placed is not None:
            return self.placed.placement
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
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan to be: all that a Plan holds but its prediction. ``setting`` describes it to ``job``."""

    choice: Choice
    placement: WeightPlacement
    pages: Mapping[str, int]
    memory: Mapping[str, TierMemory]
    setting: Setting


@dataclass(slots=True)
class Trial:
    """A choice on its way to a candidate: with ``sequences`` in flight, or as many as are best (None).

    ``tried``: the machine with budgets that leave room for what whole tensors take beyond shares.
    """

    choice: Choice
    sequences: float | None
    sweep_s: float
    tried: Machine
    placement: WeightPlacement | None = None
    solution: Solution | None = None


def realise(shop: Shop, trials: Sequence[Trial]) -> list[Candidate]:
    """The candidates that come of ``trials``: weights dealt out as the program says, then sequences and pages counted.

    Where whole tensors take more than shares, the program is asked again with smaller budgets.
    """
    pending = list(trials)
    for _ in range(_ATTEMPTS):
        if not pending:
            break
        free = _solved(pending, [shop.problem(trial.choice, machine=trial.tried) for trial in pending])
        pending = [trial for trial, solution in zip(pending, free, strict=True) if solution is not None]
        optima = [solution for solution in free if solution is not None]
        dealt = [_deal(shop, trial.choice, solution) for trial, solution in zip(pending, optima, strict=True)]
        fixed = [shop.problem(trial.choice, placement=of) for trial, of in zip(pending, dealt, strict=True)]
        again = _solved(pending, fixed)
        unsettled = []
        for trial, placement, optimum, problem, solution in zip(pending, dealt, optima, fixed, again, strict=True):
            if solution is not None and (trial.solution is None or solution.rate > trial.solution.rate):
                trial.placement, trial.solution = placement, solution
            if solution is None or solution.rate < _AS_GOOD * optimum.rate:
                over = {tier: problem.limits[tier].at(optimum.values) for tier in TIERS if tier in problem.limits}
                if not shop.fixed and max(over.values()) > 0:
                    for tier, excess in over.items():
                        less = trial.tried.budget(tier) - math.ceil(max(0.0, excess))
                        trial.tried = trial.tried.with_budget(tier, max(0, less))
                    unsettled.append(trial)
        pending = unsettled
    found = (_whole(shop, trial, pace) for trial in trials for pace in (False, True))
    return [candidate for candidate in found if candidate is not None]


def _solved(trials: Sequence[Trial], problems: Sequence[Problem]) -> list[Solution | None]:
    """The optimum of each trial's problem: the shortest sweep of its sequences, or the highest rate of any number."""
    fixed = [place for place, trial in enumerate(trials) if trial.sequences is not None]
    found: list[Solution | None] = [None] * len(trials)
    bound = [problems[place].with_sequences(trials[place].sequences or 0.0) for place in fixed]
    for place, solution in zip(fixed, solve_all(bound, [trials[place].sweep_s for place in fixed]), strict=True):
        found[place] = solution
    others = [place for place in range(len(trials)) if place not in fixed]
    for place, solution in zip(others, solve_all([problems[place] for place in others]), strict=True):
        found[place] = solution
    return found


def _deal(shop: Shop, choice: Choice, solution: Solution) -> WeightPlacement:
    given = shop.given(choice)
    if given is not None:
        return given
    shares = {tier: solution.values.get(f"weights_{tier}", 0.0) for tier in TIERS}
    return deal(shop.resized(choice), _shares(shares), compute=shop.machine.compute, edges=choice.edges)


def _shares(parts: Mapping[str, float]) -> Shares:
    total = sum(parts.values())
    gpu, cpu = parts["gpu"] / total, parts["cpu"] / total
    gpu, cpu = (0.0 if gpu < 1e-6 else gpu), (0.0 if cpu < 1e-6 else cpu)
    if gpu > 1 - 1e-6 or cpu > 1 - 1e-6:
        return Shares(round(gpu), round(cpu), 0)
    disk = max(0.0, 1 - gpu - cpu)
    return Shares(gpu, 1 - gpu, 0) if disk < 1e-6 else Shares(gpu, cpu, disk)


def _whole(shop: Shop, trial: Trial, hasty: bool) -> Candidate | None:
    """Whole sequences and pages; None if memory has no room for them. ``hasty``: prompts come in as fast as may be."""
    if trial.solution is None or trial.placement is None:
        return None
    mean, choice = shop.mean(trial.choice), trial.choice
    parts = {way: trial.solution.values.get(kv_name(way), 0.0) for way in choice.ways}
    total = sum(parts.values())
    used: tuple[Way, ...] = tuple(way for way in choice.ways if parts[way] > 1e-3 * total)
    ways = {way: parts[way] / sum(parts[other] for other in used) for way in used}
    sequences = max(1, math.floor(total * (1 + _SOLVER_SLACK)))
    steady, wide = _paces(choice, mean, sequences)
    if hasty and wide == steady:
        return None
    choice = replace(choice, ways=used, cut=replace(choice.cut, prompt_tokens=wide if hasty else steady))
    pages = pages_of(shop, choice, trial.placement, ways, sequences)
    if pages is None:
        return None
    memory = shop.memory(choice, trial.placement, pages, sequences)
    if any(used_bytes.total > used_bytes.budget for used_bytes in memory.values()):
        return None
    placement = trial.placement if shop.placed is not None else _roomier(trial.placement, memory)
    memory = shop.memory(choice, placement, pages, sequences)
    last = len(shop.size.groups) - 1
    weights = traffic(shop.resized(choice), placement.tiers, choice.precision, shop.machine.compute, last)
    setting = Setting(
        choice=choice,
        cost=shop.cost(choice),
        weights=weights,
        mean=mean,
        ways=ways,
        sequences=sequences,
        prompt_tokens=choice.cut.prompt_tokens,
        pages=sum(pages.values()),
        overlap=shop.options.overlap,
    )
    return Candidate(choice, placement, pages, memory, setting)


def _roomier(placement: WeightPlacement, memory: Mapping[str, TierMemory]) -> WeightPlacement:
    """What memory is left lets more weights be on their way, so that transfers do not wait for products."""
    left = {tier: max(0, held.budget - held.total) for tier, held in memory.items()}
    return replace(
        placement,
        host_ring=grown_ring(placement.reads, left["cpu"]),
        gpu_ring=grown_ring(placement.uploads, left["gpu"]),
    )


def _paces(choice: Choice, mean: Mean, sequences: int) -> tuple[int, int]:
    """Prompt tokens that a sweep may take in: as fast as rows end, so that sweeps are alike, or as fast as may be."""
    wide, steady = choice.cut.prompt_tokens, sequences * mean.prompt.tokens
    if choice.cut.block:
        return wide, max(wide, math.ceil(steady * mean.sweeps))
    pace = max(_LEAST_PACE, math.ceil(steady))
    return pace, max(pace, wide)


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
    total = min(total, min(float(choice.cut.longest_pages), mean.most) * sequences + mean.standing * len(shares))
    pages = {tier: max(1, min(room[tier], math.ceil(share * total - 1e-6))) for tier, share in shares.items()}
    home = max(shares, key=lambda tier: shares[tier])
    pages[home] = max(pages[home], min(room[home], choice.cut.longest_pages))
    return pages if pages[home] >= choice.cut.shortest_pages and mean.pages > 0 else None
