"""The one linear program against an enumeration of block sizes with another solver, and its duals against changes."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from scipy.optimize import linprog

from flexbatch.policy.program import Problem, Row, Solution, shortfall, solve, solve_all
from flexbatch.policy.search import _choices
from tests.policy.cases import random_shop

CASES = int(os.environ.get("FLEXBATCH_LP_CASES", "40"))  # 500 take about two minutes


class Enumeration:
    """The best rate over a fine grid of block sizes: for each, the shortest sweep, found by HiGHS."""

    def __init__(self, problem: Problem) -> None:
        self.names = problem.variables
        self.gain = np.array([problem.gain.get(name, 0.0) for name in self.names])
        self.most = -problem.limits["rows"].constant
        rows, bounds = [], []
        for row in problem.times.values():
            rows.append([*self._terms(row), -1.0])
            bounds.append(-row.constant)
        for row in problem.limits.values():
            scale = max(abs(row.constant), *map(abs, row.terms.values()), 1e-300)
            rows.append([*(self._terms(row) / scale), 0.0])
            bounds.append(-row.constant / scale)
        self.upper, self.bounds = np.array(rows), np.array(bounds)
        self.equal = [[*self._terms(row), 0.0] for row in problem.equal.values()]
        self.right = [-row.constant for row in problem.equal.values()]

    def _terms(self, row: Row) -> np.ndarray:
        return np.array([row.terms.get(name, 0.0) for name in self.names])

    def rate(self, block: float) -> float:
        number = [float(name in self.gain_names) for name in self.names]
        found = linprog(
            [*np.zeros(len(self.names)), 1.0],
            A_ub=self.upper,
            b_ub=self.bounds,
            A_eq=np.array([*self.equal, [*number, 0.0]]),
            b_eq=[*self.right, block],
            method="highs",
        )
        return float(self.gain @ found.x[:-1] / found.x[-1]) if found.status == 0 and found.x[-1] > 0 else 0.0

    @property
    def gain_names(self) -> set[str]:
        return {name for name, gain in zip(self.names, self.gain, strict=True) if gain}

    def feasible(self) -> tuple[float, float] | None:
        """The smallest and the largest block that the limits allow."""
        number = np.array([*(float(name in self.gain_names) for name in self.names), 0.0])
        rows = {"A_ub": self.upper, "b_ub": self.bounds, "method": "highs"}
        if self.equal:
            rows |= {"A_eq": np.array(self.equal), "b_eq": self.right}
        least, most = linprog(number, **rows), linprog(-number, **rows)
        return (least.fun, -most.fun) if least.status == most.status == 0 else None

    def best(self) -> float:
        ends = self.feasible()
        if ends is None:
            return 0.0
        blocks = np.geomspace(max(1.0, ends[0]), min(self.most, ends[1]), 28)
        rates = [self.rate(block) for block in blocks]
        for _ in range(3):  # N / T is quasi-concave, for T is convex in N
            place = int(np.argmax(rates))
            blocks = np.geomspace(blocks[max(0, place - 1)], blocks[min(len(blocks) - 1, place + 1)], 12)
            rates = [self.rate(block) for block in blocks]
        return max(rates)


@pytest.mark.parametrize("seed", range(CASES))
def test_one_program_finds_what_enumeration_finds(seed: int) -> None:
    shop = random_shop(seed)
    rng = random.Random(seed)
    choice = rng.choice(list(_choices(shop, shop.machine.compute)))
    problem = shop.problem(choice)
    found = solve(problem)
    truth = Enumeration(problem).best()
    if found is None:
        assert truth == 0.0
        return
    assert found.rate == pytest.approx(truth, rel=0.005)
    assert keeps(problem, found)


def keeps(problem: Problem, found: Solution) -> bool:
    """Whether a solution satisfies all rows, each up to a millionth of its largest part."""
    for kind, rows in (("limit", problem.limits), ("equal", problem.equal)):
        for row in rows.values():
            parts = [abs(factor * found.values[name]) for name, factor in row.terms.items()]
            slack = 1e-6 * max([abs(row.constant), *parts])
            value = row.at(found.values)
            if value > slack or (kind == "equal" and value < -slack):
                return False
    return max(row.at(found.values) for row in problem.times.values()) <= found.sweep_s * (1 + 1e-6)


def toy(memory: float = 5.0) -> Problem:
    """T >= 1 + 2 x on one resource, 0.5 x on another; x <= memory."""
    times = {"slow": Row({"x": 2.0}, 1.0), "fast": Row({"x": 0.5})}
    return Problem({"x": 1.0}, times, {"memory": Row({"x": 1.0}, -memory)})


def test_a_toy_by_hand() -> None:
    found = solve(toy())
    assert found is not None
    assert found.values["x"] == pytest.approx(5)
    assert found.sweep_s == pytest.approx(11)
    assert found.rate == pytest.approx(5 / 11)
    assert found.bottleneck == "slow"
    assert found.busy_s == pytest.approx({"slow": 11, "fast": 2.5})


def test_prices_are_derivatives() -> None:
    found, more = solve(toy()), solve(toy(5.001))
    assert found is not None
    assert more is not None
    assert found.prices["memory"] == pytest.approx((more.rate - found.rate) / 0.001, rel=1e-2)
    faster = solve(toy().with_faster("slow", 1.001))
    assert faster is not None
    assert found.time_prices["slow"] == pytest.approx((faster.rate - found.rate) / 0.001, rel=1e-2)
    assert found.time_prices["fast"] == 0


def test_problems_solved_together_do_not_meet() -> None:
    nothing = Problem({"x": 1.0}, toy().times, {"memory": Row({"x": 1.0}, 5.0)})
    together = solve_all([toy(), nothing, toy(1.0)])
    assert together[1] is None
    assert [found and round(found.rate, 6) for found in together] == [round(5 / 11, 6), None, round(1 / 3, 6)]
    assert solve_all([]) == []


def test_of_equal_rates_the_shortest_sweep() -> None:
    problem = Problem(
        {"x": 1.0}, {"only": Row({"x": 2.0})}, {"rows": Row({"x": 1.0}, -10.0), "least": Row({"x": -1.0}, 3.0)}
    )
    found = solve_all([problem.with_rate(0.49)], [20.0])[0]
    assert found is not None
    assert found.values["x"] == pytest.approx(3, rel=1e-4)
    fixed = solve_all([problem.with_sequences(7.0)], [20.0])[0]
    assert fixed is not None
    assert fixed.sweep_s == pytest.approx(14)


def test_what_is_missing() -> None:
    problem = Problem({"x": 1.0}, toy().times, {"a": Row({"x": 3.0}, 4.0), "b": Row({"x": 1.0}, -1.0)})
    assert solve(problem) is None
    assert shortfall(problem, "a", 0.5) == pytest.approx(5.5)
    assert shortfall(problem, "b", 0.5) is None
