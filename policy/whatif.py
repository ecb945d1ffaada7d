"""What a plan would gain from more memory or faster links: its linear program solved again with one thing changed.

It builds no plans; that a whole plan follows the program is the search's concern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flexbatch.policy.candidates import Candidate, Shop, realise
from flexbatch.policy.plan import TIERS, Plan
from flexbatch.policy.program import Problem, solve
from flexbatch.policy.search import Ranked, ranking
from flexbatch.policy.simulator import Simulator
from flexbatch.policy.verdict import simulated
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


def look_into(shop: Shop, plan: Plan, *, timeline: bool = False) -> Insight:
    """Return what limits ``plan``, which the search chose for ``shop``, and on demand how a sweep of it passes."""
    ranked = ranking(shop)
    if not ranked:
        return Insight()
    own, candidate = _behind(shop, plan, ranked)
    problem = shop.problem(own.choice)
    base = solve(problem)
    if base is None:
        return Insight()

    def gain(changed: Problem) -> float:
        found = solve(changed)
        return 0.0 if found is None else max(0.0, found.rate / base.rate - 1)

    tiers = [tier for tier in TIERS if tier in problem.limits]
    events: tuple[Event, ...] = ()
    if timeline and candidate is not None:
        simulator = Simulator(overlap=shop.options.overlap)
        if (timing := simulated(shop, candidate, keep=simulator)) is not None:
            events = tuple(event for event in simulator.events if timing.start <= event.start < timing.end)
    return Insight(
        more={tier: gain(problem.with_more(tier, GIGABYTE)) for tier in tiers},
        faster={name: gain(_twice(problem, name)) for name in _RESOURCES if name in problem.times},
        full=tuple(tier for tier in tiers if base.prices.get(tier, 0.0) > 0),
        short_job=base.prices.get("rows", 0.0) > 0,
        events=events,
    )


def _twice(problem: Problem, resource: str) -> Problem:
    """``resource`` twice as fast; what reading and writing of the disk take together follows."""
    changed = problem.with_faster(resource, 2.0)
    if "disk" in changed.times:
        both = changed.times["disk_read"] + changed.times["disk_write"]
        changed = replace(changed, times={**changed.times, "disk": both})
    return changed


def _behind(shop: Shop, plan: Plan, ranked: list[Ranked]) -> tuple[Ranked, Candidate | None]:
    """The choice that ``plan`` was made of, with its candidate; else the best choice."""
    for entry in ranked:
        cut, precision = entry.choice.cut, entry.choice.precision
        alike = (
            max(1, cut.micro_tokens) == plan.micro_batch_tokens
            and max(1, cut.micro_sequences) == plan.micro_batch_sequences
            and (entry.choice.weight_bits, precision.kv_bits) == (plan.weight_bits, plan.kv_bits)
        )
        if not alike:
            continue
        for candidate in realise(shop, entry.choice, 0.99 * ranked[0].solution.rate):
            same = candidate.placement.shares == plan.weights and dict(candidate.pages) == dict(plan.kv_pages)
            pace = candidate.setting.prompt_tokens == plan.prompt_tokens_per_sweep
            if same and pace and candidate.setting.sequences == plan.max_sequences:
                return entry, candidate
    return ranked[0], None
