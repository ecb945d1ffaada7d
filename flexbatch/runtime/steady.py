"""Repeats a measurement until its median stands still. Knows samples and a clock, not what is measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Patience:
    """When to stop: the median is known to ``spread`` (relative) after ``least`` samples, or ``seconds`` are over.

    The first sample is thrown away: it meets cold caches and memory that was never touched.
    """

    spread: float = 0.02
    least: int = 5
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """The median of ``count`` samples, and half the relative width of the interval that likely holds the true one."""

    value: float
    spread: float
    count: int


def steady(sample: Callable[[], float], patience: Patience, clock: Clock = time.perf_counter) -> Estimate:
    """Call ``sample`` until ``patience`` ends and return what it found; at least one sample counts."""
    deadline = clock() + patience.seconds
    sample()
    found: list[float] = []
    while True:
        found.append(sample())
        spread = relative_spread(found)
        if clock() >= deadline or (len(found) >= patience.least and spread <= patience.spread):
            return Estimate(statistics.median(found), spread, len(found))


def relative_spread(samples: list[float]) -> float:
    """How far the median of ``samples`` may be off, relative to it: the notch of a box plot (McGill et al., 1978).

    1.57 interquartile ranges over the root of their number; infinite for fewer than two samples.
    """
    if len(samples) < 2:
        return math.inf
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return 1.57 * (high - low) / math.sqrt(len(samples)) / middle if middle else math.inf
