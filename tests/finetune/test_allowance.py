"""What training may take from inference, against sums by hand."""

from __future__ import annotations

import random

import pytest

from flexbatch.finetune.allowance import Allowance

DISK = {"disk_read": 1.0}


def test_products_that_hide_under_transfers_cost_nothing() -> None:
    allowance = Allowance(0.1)
    allowance.shared(8, 1.0, 0.8, 0.9, {"disk_read": 0.99, "h2d": 0.3})
    assert allowance.lost_s == pytest.approx(0.01)
    assert allowance.inference_s == pytest.approx(0.99)
    allowance = Allowance(0.1)
    allowance.shared(8, 1.0, 0.8, 1.0, {"disk_read": 0.05})
    assert allowance.lost_s == pytest.approx(0.8)
    allowance.shared(8, 1.0, 0.8, 1.0, {})
    assert allowance.lost_s == pytest.approx(1.6)


def test_what_is_fetched_ahead_is_counted_where_it_is_used() -> None:
    """A long sweep in which the disk went on, then one that is shorter for that: nothing is lost."""
    allowance = Allowance(0.1)
    for _ in range(20):
        allowance.shared(8, 1.2, 0.8, 1.2, {"disk_read": 1.2})
        allowance.shared(8, 0.8, 0.4, 0.8, {"disk_read": 0.8})
    assert abs(allowance.lost_s) < 0.02 * allowance.inference_s
    assert allowance.lost_s + allowance.inference_s == pytest.approx(40.0)


def test_a_sweep_after_a_ridden_one_is_not_the_usual_one() -> None:
    """Training in every other sweep: the next one finds weights there. As long as both would have taken: no loss."""
    allowance = Allowance(0.1)
    for _ in range(5):
        allowance.swept(8, 1.0, 0.4, DISK)
    for _ in range(20):
        allowance.shared(8, 1.2, 0.8, 1.2, DISK)
        allowance.swept(8, 0.8, 0.4, DISK)
    assert allowance.lost_s == pytest.approx(0.0, abs=1e-9)
    assert allowance.inference_s == pytest.approx(45.0)
    assert allowance.idle_s(8) == pytest.approx(0.6)


def test_transfers_that_training_slows_down_are_its_loss() -> None:
    allowance = Allowance(0.1)
    allowance.swept(8, 1.0, 0.4, DISK)
    allowance.shared(8, 1.3, 0.8, 1.2, {"disk_read": 1.25})
    assert allowance.lost_s == pytest.approx(0.3)
    allowance.shared(100, 1.3, 0.8, 1.2, {"disk_read": 1.25})  # a larger sweep: nothing is known of such
    assert allowance.lost_s == pytest.approx(0.35)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_idle_time_is_what_sweeps_have_without_training(overlap: bool) -> None:
    """Of sweeps of 1 s whose products take 0.4 s, training or not; nothing can be used of it without overlap."""
    allowance = Allowance(0.1, overlap=overlap)
    assert allowance.idle_s(8) == 0
    for _ in range(40):
        allowance.swept(8, 1.0, 0.4, DISK)
        allowance.swept(800, 2.0, 1.9, DISK)
        allowance.shared(9, 1.05, 0.6, 1.0, DISK if overlap else {})
    assert allowance.idle_s(10) == pytest.approx(0.6 if overlap else 0.0, abs=1e-3)
    assert allowance.idle_s(1000) == pytest.approx(0.1 if overlap else 0.0, abs=1e-3)
    assert allowance.budget_s(8) >= allowance.idle_s(8)


def test_sweeps_without_idle_time_are_left_alone_beside_others() -> None:
    allowance = Allowance(0.5)
    allowance.shared(8, 1.5, 1.0, 1.5, DISK)
    for _ in range(40):
        allowance.swept(800, 2.0, 2.0, DISK)
    assert allowance.allows(800, 1.0)  # for long there were no others
    for _ in range(40):
        allowance.swept(8, 1.0, 0.4, DISK)
        allowance.swept(800, 2.0, 2.0, DISK)
    assert allowance.allows(8, 1.0)
    assert not allowance.allows(800, 1.0)


def test_a_sweep_is_ridden_while_its_loss_is_allowed() -> None:
    allowance = Allowance(0.1)
    assert allowance.allows(8, 100.0)  # the first
    for _ in range(40):
        allowance.swept(8, 1.0, 0.4, DISK)
    allowance.shared(8, 2.0, 1.6, 2.0, DISK)  # a second lost, of 41 / 9 that may be
    left = 41 / 9 - 1
    assert allowance.budget_s(8) == pytest.approx(0.6 + left / 4)
    assert allowance.allows(8, 0.6 + left - 0.01)
    assert not allowance.allows(8, 0.6 + left + 0.01)
    allowance.stopped(left + 0.1)
    assert not allowance.allows(8, 0.1)  # what was lost too much has to come back first
    assert allowance.budget_s(8) == pytest.approx(0.6)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_no_more_is_lost_than_allowed(share: float) -> None:
    """In a long run of sweeps with pauses wherever they are allowed, up to the first one and the size of one."""
    rng = random.Random(1)
    allowance = Allowance(share)
    for _ in range(2000):
        while allowance.suffices:
            allowance.stopped(0.3)
        allowance.swept(8, rng.uniform(0.1, 0.5), 0.1, {})
    lost = allowance.lost_s / (allowance.lost_s + allowance.inference_s)
    assert share * 0.95 < lost <= share * 1.01 + 0.001


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_riding_takes_the_idle_time_and_what_may_be_lost(share: float) -> None:
    """Sweeps of 1 s that wait 0.6 s; each may be ridden for as long as the budget says."""
    allowance, learned, seconds = Allowance(share), 0.0, 0.0
    for _ in range(2000):
        budget = allowance.budget_s(8)
        if allowance.allows(8, budget):
            took = max(1.0, 0.4 + budget)
            allowance.shared(8, took, budget, 0.4 + budget, DISK)
            learned, seconds = learned + budget, seconds + took
        else:
            allowance.swept(8, 1.0, 0.4, DISK)
            seconds += 1.0
    assert 1 - 2000 / seconds == pytest.approx(share, rel=0.02)
    assert learned == pytest.approx(0.6 * 2000 + share * seconds, rel=0.02)
