"""Linear-fractional programs and their solution as one linear program (Charnes and Cooper, 1962), modelled in PuLP.

Maximise (gain . z) / T over z >= 0 and T >= every time row. It knows no models and no machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """``times`` are seconds by resource, T is at least each; ``limits`` are at most 0, ``equal`` are 0.

    ``rate``: the least that gain / T may be.
    """

    gain: Mapping[str, float]
    times: Mapping[str, Row]
    limits: Mapping[str, Row]
    equal: Mapping[str, Row] = field(default_factory=dict)
    rate: float = 0.0

    @property
    def variables(self) -> list[str]:
        """All names, in the order of their first use."""
        rows = (*self.times.values(), *self.limits.values(), *self.equal.values())
        return list(dict.fromkeys([*self.gain, *(name for row in rows for name in row.terms)]))

    def with_more(self, limit: str, amount: float) -> Problem:
        """The same with ``amount`` more of what ``limit`` bounds."""
        row = self.limits[limit]
        return replace(self, limits={**self.limits, limit: Row(row.terms, row.constant - amount)})

    def with_sequences(self, number: float) -> Problem:
        """The same with the sum of all that gains fixed."""
        return replace(self, equal={**self.equal, "number": Row(dict.fromkeys(self.gain, 1.0), -number)})

    def with_rate(self, rate: float) -> Problem:
        """The same with a rate of at least ``rate``."""
        return replace(self, rate=rate)

    def with_faster(self, resource: str, factor: float) -> Problem:
        """The same with ``resource`` ``factor`` times as fast."""
        row = self.times[resource]
        faster = Row({name: value / factor for name, value in row.terms.items()}, row.constant / factor)
        return replace(self, times={**self.times, resource: faster})


@dataclass(frozen=True, slots=True)
class Solution:
    """An optimum: ``rate`` = gain / ``sweep_s``.

    Its duals, to first order: ``prices`` is what the rate gains from one more of what a limit bounds (a byte, a row),
    ``time_prices`` what it gains from a resource that is twice as fast.
    """

    rate: float
    sweep_s: float
    values: Mapping[str, float]
    busy_s: Mapping[str, float]
    prices: Mapping[str, float]
    time_prices: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        """The resource that is busy longest."""
        return max(self.busy_s, key=lambda name: self.busy_s[name])


def solve(problem: Problem) -> Solution | None:
    """Return the optimum, or None if nothing with a gain satisfies the limits."""
    return solve_all([problem])[0]


def solve_all(problems: Sequence[Problem], scales_s: Sequence[float] | None = None) -> list[Solution | None]:
    """Return the optimum of each, all found by one call of the solver: they share no variable.

    With ``scales_s`` (about each sweep's seconds) the shortest sweep is found instead of the highest rate, and among
    equal ones that which keeps its resources least busy: for problems that bound their rate or fix their sequences.
    """
    program = pulp.LpProblem("plan", pulp.LpMaximize)
    parts = [_Part(program, index, problem) for index, problem in enumerate(problems)]
    if scales_s is None:
        program.setObjective(pulp.lpSum(part.rate for part in parts))
    else:
        program.setObjective(pulp.lpSum(part.haste(scale) for part, scale in zip(parts, scales_s, strict=True)))
    if parts:
        program.solve(_solver())
        status = pulp.LpStatus[program.status]
        if status != "Optimal":
            raise InternalError(f"the plan's linear program ended as {status}")
    return [part.solution() for part in parts]


class _Part:
    """One problem in the variables z / T and 1 / T. Nothing at all is always feasible there, with a rate of 0."""

    def __init__(self, program: pulp.LpProblem, index: int, problem: Problem) -> None:
        self._problem = problem
        self._inverse = program.add_variable(f"t{index}", lowBound=0)
        self._scaled = {
            name: program.add_variable(f"z{index}_{place}", lowBound=0) for place, name in enumerate(problem.variables)
        }
        self._busy = {name: _expression(row, self._scaled, self._inverse) for name, row in problem.times.items()}
        self.rate = pulp.LpAffineExpression([(self._scaled[name], gain) for name, gain in problem.gain.items()])
        self._times: dict[str, pulp.LpConstraint] = {}
        for place, (name, busy) in enumerate(self._busy.items()):
            self._times[name] = busy <= 1
            program.addConstraint(self._times[name], f"b{index}_{place}")
        self._rows: dict[str, tuple[pulp.LpConstraint, float]] = {}
        for name, row in (*problem.limits.items(), *problem.equal.items()):
            scale = 1 / _scale(row)
            expression = _expression(_scaled(row, scale), self._scaled, self._inverse)
            constraint = expression <= 0 if name in problem.limits else expression == 0
            program.addConstraint(constraint, f"c{index}_{len(self._rows)}")
            self._rows[name] = (constraint, scale)

        if problem.rate > 0:
            program.addConstraint(self.rate >= problem.rate, f"r{index}")

    def haste(self, scale_s: float) -> pulp.LpAffineExpression:
        """1 / T in units of about 1, less a little for every resource that is busy."""
        return scale_s * self._inverse - _BUSY * pulp.lpSum(self._busy.values())

    def solution(self) -> Solution | None:
        """What the solver found, back in z and T."""
        reached, t = float(self.rate.value() or 0.0), float(self._inverse.value() or 0.0)
        if t <= 0 or reached <= 0:
            return None
        values = {name: max(0.0, float(variable.value() or 0.0)) / t for name, variable in self._scaled.items()}
        prices = {name: float(row.pi or 0.0) * scale * t for name, (row, scale) in self._rows.items()}
        time_prices = {name: float(row.pi or 0.0) for name, row in self._times.items()}
        busy_s = {name: row.at(values) for name, row in self._problem.times.items()}
        return Solution(reached, 1 / t, values, busy_s, prices, time_prices)


def shortfall(problem: Problem, limit: str, least: float) -> float | None:
    """How much more of what ``limit`` bounds would allow a gain of ``least``; None if no amount would."""
    program = pulp.LpProblem("shortfall", pulp.LpMinimize)
    scale = _scale(problem.limits[limit])
    missing = program.add_variable("missing", lowBound=0)
    one = program.add_variable("one", lowBound=1, upBound=1)
    names = {name: program.add_variable(f"z{index}", lowBound=0) for index, name in enumerate(problem.variables)}
    program.setObjective(missing)
    program.addConstraint(
        pulp.LpAffineExpression([(names[name], gain) for name, gain in problem.gain.items()]) >= least, "gain"
    )
    for index, (name, row) in enumerate((*problem.limits.items(), *problem.equal.items())):
        expression = _expression(_scaled(row, 1 / _scale(row)), names, one)
        if name == limit:
            expression = expression - missing
        program.addConstraint(expression <= 0 if name in problem.limits else expression == 0, f"r{index}")
    program.solve(_solver())
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


def _solver() -> pulp.LpSolver:
    """The CBC that comes with PuLP."""
    return pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, mip=False, msg=False, threads=1)
