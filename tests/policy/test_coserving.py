"""Finetuning beside inference: the choice against its own figures, and those against Steps on the simulator."""

from __future__ import annotations

import random

import pytest

from flexbatch.options import EngineOptions
from flexbatch.policy.coserving import CoservingPlan, input_bytes, inputs_tier, plan_coserving, reserved
from flexbatch.policy.cost import traffic
from flexbatch.policy.machine import Machine
from flexbatch.policy.training import TrainingJob, plan_training
from flexbatch.policy.training_time import batch_seconds, learning_cost, load_of_batch, pass_timing
from flexbatch.scheduler.lowering import Routes
from flexbatch.scheduler.training import cut, reverse_order, riding_order
from flexbatch.units import Shares
from tests.plans import small_plan
from tests.policy.cases import GB, model, profile

NAME = "llama-2-7b"
PROFILE = profile(gpu=None, cpu=2e13, read=1e9)
WINDOW = 256


def job_of(batches: int, lowest: int = 1) -> TrainingJob:
    return TrainingJob(batches * WINDOW, WINDOW, WINDOW, 40_000_000, lowest)


def routes_of(disk: float) -> Routes:
    """A processor that streams this part of every layer from disk."""
    size, _ = model(NAME)
    layers = range(1, size.shape.num_layers + 1)
    reads = {group: int(2 * disk * size.groups[group].matrices) for group in layers} if disk else {}
    return Routes(num_layers=size.shape.num_layers, compute="cpu", reads=reads)


def planned(
    *, disk: float, product_s: float, batches: int, share: float = 0.1, kept: str = "cpu", order: object = None
) -> CoservingPlan:
    size, _ = model(NAME)
    routes = routes_of(disk)
    stream_s = sum(routes.reads.values()) / PROFILE.links["disk_read"]
    sweep_s = max(stream_s, product_s)
    predicted = {"sweep_s": sweep_s, "resource_s": {"cpu": product_s, "disk_read": stream_s}}
    plan = small_plan(predicted=predicted, dtype="float32", weights_dtype="float32")
    return plan_coserving(
        size,
        job_of(batches),
        plan,
        routes,
        PROFILE,
        kept=kept,
        share=share,
        batches=batches,
        order=order,  # type: ignore[arg-type]
    )


def test_without_streams_there_is_nothing_to_ride_on() -> None:
    found = planned(disk=0, product_s=3.0, batches=64)
    assert (found.order, found.together, found.kept) == ("reverse", 1, "cpu")
    assert "moves no weights either" in found.reason
    assert found.predicted["reverse_tokens_per_s"] > found.predicted["riding_tokens_per_s"]


def test_idle_products_are_ridden_on() -> None:
    """Four times as many micro-batches as layers: the pipe is 80% full, and inference does not notice."""
    found = planned(disk=1, product_s=0.5, batches=4 * 32)
    assert found.order == "riding"
    assert found.predicted["sweep_s"] <= found.predicted["alone_sweep_s"] / 0.9
    assert found.tokens_per_sweep == found.together * WINDOW
    assert planned(disk=1, product_s=0.5, batches=4 * 32, order="reverse").order == "reverse"


@pytest.mark.parametrize("seed", range(20))
def test_a_sweep_takes_in_what_makes_steps_shortest(seed: int) -> None:
    """Against every number of micro-batches a sweep may take in."""
    rng = random.Random(seed)
    size, _ = model(NAME)
    batches, share = rng.randint(1, 200), rng.choice([0.01, 0.1, 0.4])
    disk, product_s = rng.choice([0.2, 1.0]), rng.uniform(0.1, 20)
    found = planned(disk=disk, product_s=product_s, batches=batches, share=share, order="riding")
    routes = routes_of(disk)
    cost = learning_cost(size, PROFILE, compute="cpu", dtype="float32", held="float32", packed=False, logit_rows=256)
    load = load_of_batch(cut([WINDOW], WINDOW)[0], size.shape.windows)
    weights = traffic([], {}, cost.precision, "cpu", size.shape.num_layers + 1)
    each = batch_seconds(cost, load, weights, 1)  # without widening: a lower bound
    alone = max(sum(routes.reads.values()) / PROFILE.links["disk_read"], product_s)
    ridden = found.predicted["sweep_s"]
    assert ridden >= max(alone, product_s + found.together * each) * (1 - 1e-9)
    if found.together > 1:
        assert ridden <= alone / (1 - share) * (1 + 1e-9)
        fuller = product_s + (found.together + 1) * each
        sweeps = -(-batches // found.together), -(-batches // (found.together + 1))
        assert fuller > alone / (1 - share) * 0.5 or sweeps[0] == sweeps[1]


def test_what_is_reserved_is_where_inputs_rest() -> None:
    size, _ = model(NAME)
    job = job_of(64)
    for budget, tier in ((1000 * GB, "cpu"), (40 * GB, "disk")):
        machine = Machine("cpu", 0, budget, 500 * GB, "float32")
        assert inputs_tier(size, job, machine) == tier
        left = reserved(size, job, machine, tier)
        assert machine.budget(tier) - left.budget(tier) >= input_bytes(size, job, "float32")
        assert left.budget("cpu") < budget


@pytest.mark.parametrize("disk", [0.0, 1.0])
def test_a_pass_takes_its_products_or_its_streams(disk: float) -> None:
    size, units = model(NAME)
    job = job_of(4)
    machine = Machine("cpu", 0, 200 * GB, 500 * GB, "float32")
    options = EngineOptions(device="cpu", weights=Shares(0, 1 - disk, disk))
    plan = plan_training(size, units, job, options, machine, stored_dtype=size.shape.stored_dtype)
    batches = cut([WINDOW] * 4, WINDOW)
    visits = reverse_order(size.shape.num_layers, len(batches), 1)
    timing = pass_timing(size, units, plan, visits, batches, PROFILE, "cpu")
    cost = learning_cost(
        size, PROFILE, compute="cpu", dtype="float32", held=plan.weights_dtype, packed=False, logit_rows=262
    )
    weights = traffic(units, plan.tiers, cost.precision, "cpu", size.shape.num_layers + 1)
    load = load_of_batch(batches[0], size.shape.windows)
    products = len(batches) * batch_seconds(cost, load, weights, 1)
    stream = sum(weights.read.values()) / PROFILE.links["disk_read"]
    assert timing.busy_s["cpu"] == pytest.approx(products, rel=0.02)
    assert timing.seconds >= max(products, timing.busy_s.get("disk_read", 0)) * 0.98
    assert timing.seconds <= max(products, 2 * stream) * 1.25
    rode = pass_timing(size, units, plan, riding_order(size.shape.num_layers, 4, 1), batches, PROFILE, "cpu")
    assert rode.busy_s["cpu"] == pytest.approx(timing.busy_s["cpu"], rel=1e-6)
