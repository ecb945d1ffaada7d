"""The random stream of a row."""

from __future__ import annotations

import pytest

from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.randomness import uniform


def test_seeded_rows_depend_on_seed_and_position_only() -> None:
    a = [uniform(SamplingParams(seed=3, run_seed=1), "a", n) for n in range(50)]
    assert a == [uniform(SamplingParams(seed=3, run_seed=2, temperature=0.5), "b", n) for n in range(50)]
    assert len(set(a)) == 50
    assert a != [uniform(SamplingParams(seed=4), "a", n) for n in range(50)]


def test_unseeded_rows_depend_on_run_seed_and_id() -> None:
    values = {
        (run, name, n): uniform(SamplingParams(run_seed=run), name, n)
        for run in (-1, 0, 1, 10)
        for name in ("", "a", "b", "0/a", "/a", "\ud800")
        for n in (0, 1, 10, 100)
    }
    assert len(set(values.values())) == len(values)
    assert values == {
        (run, name, n): uniform(SamplingParams(run_seed=run, top_k=5), name, n) for run, name, n in values
    }


def test_a_seed_of_its_own_is_no_run_seed() -> None:
    assert uniform(SamplingParams(seed=0), "", 0) != uniform(SamplingParams(run_seed=0), "", 0)


def test_numbers_are_uniform_and_below_one() -> None:
    values = sorted(uniform(SamplingParams(seed=n % 40), "", n // 40) for n in range(20_000))
    assert values[0] >= 0
    assert values[-1] < 1
    distance = max(abs(value - (n + 0.5) / len(values)) for n, value in enumerate(values))
    assert distance < 1.63 / len(values) ** 0.5  # Kolmogorov-Smirnov, 1%: the values are fixed, so it cannot flake


def test_numbers_stay_as_they_are() -> None:
    """A resumed job must draw what the interrupted one would have drawn, whatever the release."""
    assert uniform(SamplingParams(seed=7), "x", 3) == pytest.approx(SEEDED, abs=0)
    assert uniform(SamplingParams(run_seed=7), "x", 3) == pytest.approx(UNSEEDED, abs=0)


SEEDED = 0.132507676696479
UNSEEDED = 0.4839943871422461
