"""Linear-fractional programs and their solution as one linear program (Charnes and Cooper, 1962), modelled in PuLP.

Maximise (gain . z) / T over z >= 0 and T >= every time row. It knows no models and no machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pulp

from flexbatch.errors import InternalError

_BUSY = 1e-3  # among equal sweeps the one that keeps its resources less busy


@dataclass(frozen=True, slots=True)
class Row:
    """``terms . z + constant``."""

    terms: Mapping[str, float]
    constant: float = 0.0

    def at(self, values: Mapping[str, float]) -> float:
        """The row's value."""
        return self.constant + sum(factor * values.get(name, 0.0) for name, factor in self.terms.items())

    def __add__(self, other: Row) -> Row:
        terms = dict(self.terms)
        for name, factor in other.terms.items():
            terms[name] = terms.get(name, 0.0) + factor
        return Row(terms, self.constant + other.constant)


@dataclass(frozen=True, slots=True)
class Problem:
    """``times`` are seconds by resource, T is at least each; ``limits`` are at most 0, ``equal`` are 0."""

    gain: Mapping[str, float]
    times: Mapping[str, Row]
    limits: Mapping[str, Row]
    equal: Mapping[str, Row] = field(default_factory=dict)

    @property
    def variables(self) -> list[str]:
        """All names, in the order of their first use."""
        rows = (*self.times.values(), *self.limits.values(), *self.equal.values())
        return list(dict.fromkeys([*self.gain, *(name for row in rows for name in row.terms)]))

    def with_more(self, limit: str, amount: float) -> Problem:
        """The same with ``amount`` more of what ``limit`` bounds."""
        row = self.limits[limit]
        return replace(self, limits={**self.limits, limit: Row(row.terms, row.constant - amount)})

    def with_faster(self, resource: str, factor: float) -> Problem:
        """The same with ``resource`` ``factor`` times as fast."""
        row = self.times[resource]
        faster = Row({name: value / factor for name, value in row.terms.items()}, row.constant / factor)
        return replace(self, times={**self.times, resource: faster})


@dataclass(frozen=True, slots=True)
class Solution:
    """An optimum: ``rate`` = gain / ``sweep_s``. ``prices``: what the rate gains when a row is relaxed by one.

    A limit's unit is its own (bytes); a time row's is the fraction by which its resource becomes faster.
    """

    rate: float
    sweep_s: float
    values: Mapping[str, float]
    busy_s: Mapping[str, float]
    prices: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        """The resource that is busy longest."""
        return max(self.busy_s, key=lambda name: self.busy_s[name])


def solve(problem: Problem, *, at_least: float | None = None) -> Solution | None:
    """Return the optimum, or None if nothing with a gain satisfies the limits.

    With ``at_least``: of all points of that rate or more, the one with the shortest sweep.
    """
    program = pulp.LpProblem("plan", pulp.LpMaximize)
    inverse = pulp.LpVariable("inverse_time", lowBound=0)
    scaled = {name: pulp.LpVariable(f"z{index}", lowBound=0) for index, name in enumerate(problem.variables)}
    busy = {name: _expression(row, scaled, inverse) for name, row in problem.times.items()}
    rate = pulp.LpAffineExpression([(scaled[name], gain) for name, gain in problem.gain.items()])
    if at_least is None:
        program.setObjective(rate)
    else:
        program.setObjective(inverse - _BUSY * pulp.lpSum(busy.values()))
        program.addConstraint(rate >= at_least, "rate")
    scales: dict[str, float] = {}
    rows: list[tuple[str, pulp.LpConstraint]] = []
    for name, expression in busy.items():
        rows.append((name, expression <= 1))
        scales[name] = 1.0
    for kind, named in (("limit", problem.limits), ("equal", problem.equal)):
        for name, row in named.items():
            scale = _scale(row)
            expression = _expression(_scaled(row, 1 / scale), scaled, inverse)
            rows.append((name, expression <= 0 if kind == "limit" else expression == 0))
            scales[name] = 1 / scale
    for index, (_, constraint) in enumerate(rows):
        program.addConstraint(constraint, f"r{index}")
    program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1))
    status = pulp.LpStatus[program.status]
    if status == "Infeasible":
        return None
    if status != "Optimal":
        raise InternalError(f"the plan's linear program ended as {status}")
    reached, t = float(rate.value() or 0.0), float(inverse.value() or 0.0)
    if t <= 0 or reached <= 0:
        return None
    values = {name: max(0.0, float(variable.value() or 0.0)) / t for name, variable in scaled.items()}
    prices = {}
    for index, (name, _) in enumerate(rows):
        dual = float(program.constraints[f"r{index}"].pi or 0.0)
        prices[name] = dual * scales[name] * (t if name in problem.limits or name in problem.equal else 1.0)
    return Solution(
        rate=reached,
        sweep_s=1 / t,
        values=values,
        busy_s={name: row.at(values) for name, row in problem.times.items()},
        prices=prices,
    )


def shortfall(problem: Problem, limit: str, least: float) -> float | None:
    """How much more of what ``limit`` bounds would allow a gain of ``least``; None if no amount would."""
    program = pulp.LpProblem("shortfall", pulp.LpMinimize)
    scale = _scale(problem.limits[limit])
    missing = pulp.LpVariable("missing", lowBound=0)
    one = pulp.LpVariable("one", lowBound=1, upBound=1)
    names = {name: pulp.LpVariable(f"z{index}", lowBound=0) for index, name in enumerate(problem.variables)}
    program.setObjective(missing)
    program.addConstraint(
        pulp.LpAffineExpression([(names[name], gain) for name, gain in problem.gain.items()]) >= least, "gain"
    )
    for index, (name, row) in enumerate((*problem.limits.items(), *problem.equal.items())):
        expression = _expression(_scaled(row, 1 / _scale(row)), names, one)
        if name == limit:
            expression = expression - missing
        program.addConstraint(expression <= 0 if name in problem.limits else expression == 0, f"r{index}")
    program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1))
    return scale * float(missing.value() or 0.0) if pulp.LpStatus[program.status] == "Optimal" else None


def _expression(row: Row, scaled: Mapping[str, pulp.LpVariable], inverse: pulp.LpVariable) -> pulp.LpAffineExpression:
    return pulp.LpAffineExpression(
        [*((scaled[name], factor) for name, factor in row.terms.items() if factor), (inverse, row.constant)]
    )


def _scaled(row: Row, factor: float) -> Row:
    return Row({name: factor * value for name, value in row.terms.items()}, factor * row.constant)


def _scale(row: Row) -> float:
    """What a row is divided by, so that all rows are of one order of magnitude."""
    return max(map(abs, (*row.terms.values(), row.constant))) or 1.0
