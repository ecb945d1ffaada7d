"""What more hardware would give: the same as planning for that other machine, and nothing where nothing binds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexbatch.checkpoint.dummy import dummy_checkpoint
from flexbatch.checkpoint.locate import locate
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.options import EngineOptions
from flexbatch.policy.candidates import Shop
from flexbatch.policy.machines import load_profile, machine_of
from flexbatch.policy.plan import Plan
from flexbatch.policy.program import solve
from flexbatch.policy.search import choose, ranking
from flexbatch.policy.weights import WeightPlacement
from flexbatch.policy.whatif import GIGABYTE, limits_of, look_into
from flexbatch.policy.workload import Workload
from flexbatch.runtime.units import unit_sizes, units_of
from flexbatch.units import GIB

pytestmark = pytest.mark.filterwarnings("ignore:.*PuLP 4:DeprecationWarning")


def shop_of(model: str, machine: str, requests: int = 1000, **options: Any) -> Shop:
    folder = locate(model, dummy=True)
    shape = folder.shape
    table = family_of(shape).table(shape)
    units = unit_sizes(units_of(table, dummy_checkpoint(folder, table), shape.vocab_size))
    profile, wanted = load_profile(machine), EngineOptions(**options)
    workload = Workload.uniform(256, 64, requests)
    budgets = machine_of(profile, wanted, shape.stored_dtype)
    size = model_size(shape, table)
    return Shop(model, size, tuple(units), workload, wanted, budgets, profile, shape.stored_dtype)


def chosen(shop: Shop) -> tuple[Plan, WeightPlacement]:
    return choose(
        shop.name,
        shop.size,
        shop.units,
        shop.workload,
        shop.options,
        shop.machine,
        shop.profile,
        stored_dtype=shop.stored_dtype,
    )


@pytest.mark.parametrize(
    ("model", "machine", "options"),
    [
        ("opt-175b", "t4", {}),
        ("opt-30b", "a10g", {"cpu_memory": 32 * GIB}),
        ("opt-13b", "rtx3060", {"gpu_memory": 4 * GIB, "cpu_memory": 8 * GIB, "disk_memory": 500 * 10**9}),
        ("llama-3.1-8b", "l4", {"device": "cpu", "cpu_memory": 24 * GIB}),
    ],
)
def test_gains_are_those_of_the_other_machine(model: str, machine: str, options: dict[str, Any]) -> None:
    shop = shop_of(model, machine, micro_batch=32, **options)
    choice = ranking(shop)[0].choice
    insight = limits_of(shop, choice)
    base = solve(shop.problem(choice))
    assert base is not None
    assert max([*insight.faster.values(), *insight.more.values()]) > 0
    for tier, gain in insight.more.items():
        assert (gain > 1e-9) == (tier in insight.full), tier
        more = shop.machine.with_budget(tier, shop.machine.budget(tier) + GIGABYTE)
        other = solve(shop.problem(choice, machine=more))
        assert other is not None
        assert other.rate / base.rate - 1 == pytest.approx(gain, abs=1e-6), tier
    for name, gain in insight.faster.items():
        if name in shop.profile.links:
            links = {**shop.profile.links, name: 2 * shop.profile.links[name]}
            faster = replace(shop, profile=replace(shop.profile, links=links), _costs={}, _means={})
            other = solve(faster.problem(choice))
            assert other is not None
            assert other.rate / base.rate - 1 == pytest.approx(gain, abs=1e-6), name


def test_a_short_job_is_limited_by_its_rows() -> None:
    shop = shop_of("opt-30b", "a10g", requests=3, micro_batch=32)
    assert limits_of(shop, ranking(shop)[0].choice).short_job
    shop = shop_of("opt-30b", "a10g", requests=3000, micro_batch=32)
    assert not limits_of(shop, ranking(shop)[0].choice).short_job


def test_the_timeline_is_a_sweep_of_the_plan() -> None:
    shop = shop_of("opt-6.7b", "rtx3060")
    plan, placement = chosen(shop)
    events = look_into(shop, plan, placement, timeline=True).events
    busy: dict[str, float] = {}
    for event in events:
        busy[event.step.resource] = busy.get(event.step.resource, 0.0) + event.end - event.start
    for resource, seconds in plan.predicted["resource_s"].items():
        assert busy[resource] == pytest.approx(seconds, rel=0.05)
    assert {event.step.group for event in events} == set(range(shop.size.shape.num_layers + 2))
