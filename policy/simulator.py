"""Interprets the Steps of sweeps against a machine's figures: when each would run. It runs and measures nothing.

One FIFO a resource, as the executor has: a Step starts when the one before it in its FIFO and those it names are done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from flexbatch.policy.cost import Cost, Load, Traffic, load_of
from flexbatch.scheduler.lowering import Lowerer
from flexbatch.scheduler.step_list import Lowered
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.sweep import Sweep
from flexbatch.scheduler.timeline import Event


@dataclass(frozen=True, slots=True)
class SweepTiming:
    """One simulated sweep: from ``start``, when it is given out, to ``end``, when its tokens are known.

    ``busy_s``: seconds of its Steps by resource, weights that it fetches for the next sweep included.
    """

    start: float
    end: float
    busy_s: dict[str, float]

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.end - self.start

    @property
    def bottleneck(self) -> str:
        """The resource that is busy longest."""
        return max(self.busy_s, key=lambda resource: self.busy_s[resource])

    @property
    def utilisation(self) -> dict[str, float]:
        """The fraction of the sweep's time that each resource is busy."""
        return {resource: busy / self.seconds for resource, busy in self.busy_s.items()} if self.seconds > 0 else {}


class Simulator:
    """Runs lowered sweeps one after the other on a clock of its own.

    ``seconds`` gives each Step's duration. With ``overlap`` a resource works through its own FIFO; without, all Steps
    follow one another. ``events`` is the timeline so far.
    """

    def __init__(self, *, overlap: bool = True, keep: bool = True) -> None:
        self.events: list[Event] = []
        self._overlap = overlap
        self._keep = keep
        self._free: dict[str, float] = defaultdict(float)
        self._done: dict[int, float] = {}
        self._clock = 0.0

    def run(self, lowered: Lowered, seconds: Callable[[Step], float], number: int) -> SweepTiming:
        """Advance by one sweep. Its Steps are given out when the sweep before has its results."""
        start, free, done = self._clock, self._free, self._done
        busy: dict[str, float] = defaultdict(float)
        end = start
        for step in lowered.steps:
            resource = step.resource if self._overlap else "all"
            begin = max(free[resource], start)
            for other in step.after:
                ready = done.get(other, 0.0)
                if ready > begin:
                    begin = ready
            took = seconds(step)
            finish = begin + took
            free[resource] = done[step.id] = finish
            busy[step.resource] += took
            if self._keep:
                self.events.append(Event(step, number, begin, finish))
            if finish > end and step.id in lowered.until:
                end = finish
        oldest = lowered.steps[0].id if lowered.steps else 0
        self._done = {step: when for step, when in done.items() if step >= oldest}
        self._clock = end
        return SweepTiming(start, end, dict(busy))


def simulate(
    lowerer: Lowerer, simulator: Simulator, sweep: Sweep, cost: Cost, weights: Traffic, *, more: bool = True
) -> SweepTiming:
    """Lower ``sweep`` and run it on ``simulator`` with the seconds that ``cost`` gives its Steps."""
    loads = [load_of(batch.slices, cost.page_tokens, cost.windows) for batch in sweep.micro_batches]
    nothing = Load()
    known: dict[tuple[str, str, int, int], float] = {}

    def seconds(step: Step) -> float:
        # All layers cost a micro-batch the same, except for their weights.
        layer = step.group if step.batch < 0 or weights.widened or weights.loose or cost.is_edge(step.group) else 1
        key = (step.kind, step.resource, layer, step.batch)
        found = known.get(key)
        if found is None:
            load = loads[step.batch] if step.batch >= 0 else nothing
            found = known[key] = cost.seconds(step.kind, step.resource, step.group, load, weights)
        return found

    return simulator.run(lowerer.lower(sweep, more=more), seconds, sweep.number)
