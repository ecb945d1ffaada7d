"""What a plan would gain from more memory or faster links: its linear program solved again with one thing changed.

It builds no plans; that a whole plan follows the program is the search's concern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flexbatch.policy.candidates import Candidate, Shop
from flexbatch.policy.cost import Way, traffic
from flexbatch.policy.job import Setting
from flexbatch.policy.plan import TIERS, Plan
from flexbatch.policy.program import Problem, solve
from flexbatch.policy.search import Ranked, ranking
from flexbatch.policy.simulator import Simulator
from flexbatch.policy.steady import Choice
from flexbatch.policy.verdict import simulated
from flexbatch.policy.weights import WeightPlacement
from flexbatch.scheduler.timeline import Event

GIGABYTE = 10**9
_RESOURCES = ("gpu", "cpu", "h2d", "d2h", "disk_read", "disk_write")


@dataclass(frozen=True, slots=True)
class Insight:
    """Relative gains in throughput from one GB ``more`` of a tier, from a resource twice as fast (``faster``).

    ``full``: the tiers whose memory binds; ``short_job``: more rows, not more hardware, would help; ``events``: a
    simulated sweep in the steady state.
    """

    more: Mapping[str, float] = field(default_factory=dict)
    faster: Mapping[str, float] = field(default_factory=dict)
    full: tuple[str, ...] = ()
    short_job: bool = False
    events: tuple[Event, ...] = ()

    def to_json(self) -> dict[str, dict[str, float]]:
        """The two tables of gains."""
        return {"one_more_gb": dict(self.more), "twice_as_fast": dict(self.faster)}


def look_into(shop: Shop, plan: Plan, placement: WeightPlacement, *, timeline: bool = False) -> Insight:
    """Return what limits ``plan``, which the search chose for ``shop``, and on demand how a sweep of it passes."""
    choice = choice_behind(plan, ranking(shop))
    if choice is None:
        return Insight()
    insight = limits_of(shop, choice)
    return replace(insight, events=_timeline(shop, plan, placement, choice)) if timeline else insight


def limits_of(shop: Shop, choice: Choice) -> Insight:
    """What limits the best plan of one ``choice``."""
    problem = shop.problem(choice)
    base = solve(problem)
    if base is None:
        return Insight()

    def gain(changed: Problem) -> float:
        found = solve(changed)
        return 0.0 if found is None else max(0.0, found.rate / base.rate - 1)

    tiers = [tier for tier in TIERS if tier in problem.limits]
    return Insight(
        more={tier: gain(problem.with_more(tier, GIGABYTE)) for tier in tiers},
        faster={name: gain(_twice(problem, name)) for name in _RESOURCES if name in problem.times},
        full=tuple(tier for tier in tiers if base.prices.get(tier, 0.0) > 0),
        short_job=base.prices.get("rows", 0.0) > 0,
    )


def _twice(problem: Problem, resource: str) -> Problem:
    """``resource`` twice as fast; what reading and writing of the disk take together follows."""
    changed = problem.with_faster(resource, 2.0)
    if "disk" in changed.times:
        both = changed.times["disk_read"] + changed.times["disk_write"]
        changed = replace(changed, times={**changed.times, "disk": both})
    return changed


def choice_behind(plan: Plan, ranked: Sequence[Ranked]) -> Choice | None:
    """The best choice that agrees with all that ``plan`` says, else the best; None if there is none."""
    for entry in ranked:
        choice, cut = entry.choice, entry.choice.cut
        said = (plan.micro_batch_tokens, plan.micro_batch_sequences, plan.weight_bits, plan.kv_bits)
        own = (max(1, cut.micro_tokens), max(1, cut.micro_sequences), choice.weight_bits, choice.precision.kv_bits)
        if said == own and _ways(plan, choice.ways) is not None:
            return choice
    return ranked[0].choice if ranked else None


def _ways(plan: Plan, ways: Sequence[Way]) -> dict[Way, float] | None:
    """The fractions of the plan's sequences that go each of ``ways``; None if some go none of them."""
    total = max(1, sum(plan.kv_pages.values()))
    streamed = plan.gpu_attention or 0.0
    found: dict[Way, float] = {}
    for tier, pages in plan.kv_pages.items():
        parts = {"": 1.0} if tier == "gpu" else {"": 1 - streamed, "_up": streamed}
        for suffix, part in parts.items():
            if pages and part:
                way = next((way for way in ways if way == f"{tier}{suffix}"), None)
                if way is None:
                    return None
                found[way] = part * pages / total
    return found


def _timeline(shop: Shop, plan: Plan, placement: WeightPlacement, choice: Choice) -> tuple[Event, ...]:
    """One sweep of the plan in its steady state, Step by Step; nothing if it has too many."""
    ways = _ways(plan, choice.ways)
    if ways is None:
        return ()
    pace = plan.prompt_tokens_per_sweep
    choice = replace(choice, ways=tuple(ways), cut=replace(choice.cut, prompt_tokens=pace))
    last = len(shop.size.groups) - 1
    setting = Setting(
        choice=choice,
        cost=shop.cost(choice),
        weights=traffic(shop.resized(choice), placement.tiers, choice.precision, shop.machine.compute, last),
        mean=shop.mean(choice),
        ways=ways,
        sequences=plan.max_sequences,
        prompt_tokens=pace,
        pages=sum(plan.kv_pages.values()),
        overlap=plan.overlap,
    )
    simulator = Simulator(overlap=plan.overlap)
    timing = simulated(shop, Candidate(choice, placement, plan.kv_pages, plan.memory, setting), keep=simulator)
    if timing is None:
        return ()
    return tuple(event for event in simulator.events if event.start >= timing.start)
