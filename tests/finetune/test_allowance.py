"""What training may take from inference, against sums by hand."""

from __future__ import annotations

import random

import pytest

from flexbatch.finetune.allowance import Allowance


def test_products_that_hide_under_transfers_cost_nothing() -> None:
    allowance = Allowance(0.1)
    allowance.shared(1.0, 0.8, {"disk_read": 0.99, "h2d": 0.3})
    assert allowance.lost_s == pytest.approx(0.01)
    assert allowance.inference_s == pytest.approx(0.99)
    allowance = Allowance(0.1)
    allowance.shared(1.0, 0.8, {"disk_read": 0.05})
    assert allowance.lost_s == pytest.approx(0.8)
    allowance.shared(1.0, 0.8, {})
    assert allowance.lost_s == pytest.approx(1.6)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_no_more_is_lost_than_allowed(share: float) -> None:
    """In a long run of sweeps with pauses wherever they are allowed, up to the first one and the size of one."""
    rng = random.Random(1)
    allowance = Allowance(share)
    for _ in range(2000):
        while allowance.suffices:
            allowance.stopped(0.3)
        allowance.swept(rng.uniform(0.1, 0.5))
    lost = allowance.lost_s / (allowance.lost_s + allowance.inference_s)
    assert share * 0.95 < lost <= share * 1.01 + 0.001
