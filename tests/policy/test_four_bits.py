"""Weights in 4 bits in plans: their bytes, what unpacking costs, and when ``auto`` chooses them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexbatch.options import EngineOptions
from flexbatch.policy.cost import Precision, traffic
from flexbatch.policy.memory import resident_bytes, sized
from flexbatch.policy.plan import Plan
from flexbatch.policy.profile import HardwareProfile
from flexbatch.policy.search import choose
from flexbatch.policy.workload import Workload
from tests.policy.cases import machine, model, profile


def plan(
    name: str, cpu: float, job: tuple[int, int, int], *, figures: HardwareProfile, packed: bool = False, **options: Any
) -> Plan:
    size, units = model(name)
    if packed:
        units = tuple(sized(units, 4))
    budgets = machine(figures, 0, cpu)
    workload, given = Workload.uniform(*job), EngineOptions(**options)
    found, _ = choose(name, size, units, workload, given, budgets, figures, stored_dtype=size.shape.stored_dtype)
    return found


def with_unpacking(figures: HardwareProfile, rate: float) -> HardwareProfile:
    """The same machine, which unpacks so many weights a second."""
    return replace(figures, cpu=replace(figures.cpu, widened={**figures.cpu.widened, "int4": rate}))


def test_layers_take_four_and_a_half_bits_and_edges_stay() -> None:
    size, units = model("llama-2-7b")
    narrow = sized(units, 4)
    for before, after in zip(units, narrow, strict=True):
        if before.edge:
            assert after == before
        else:
            assert after.packed == after.elements == before.elements
            assert after.packed_bytes == after.nbytes
            assert 4.5 <= 8 * after.nbytes / after.elements < 4.6
    assert sized(narrow, 4) == narrow
    precision = Precision("float32", "int4", "float16", "float32")
    layer = next(unit for unit in narrow if not unit.edge)
    edge = next(unit for unit in narrow if unit.edge)
    assert resident_bytes(layer, "cpu", precision.held, "cpu") == layer.nbytes
    assert resident_bytes(edge, "cpu", precision.held, "cpu") == 4 * edge.elements
    mixed = replace(layer, packed=layer.elements // 2, packed_bytes=1000, nbytes=1000 + layer.elements)
    assert resident_bytes(mixed, "cpu", precision.held, "cpu") == 1000 + 4 * (layer.elements - layer.elements // 2)
    last = len(size.groups) - 1
    moved = traffic(narrow, dict.fromkeys((unit.key for unit in narrow), "cpu"), precision, "cpu", last)
    assert sum(moved.widened.values()) == sum(unit.elements for unit in narrow if not unit.edge)


@pytest.mark.parametrize("cpu", [6.0, 40.0])
def test_a_packed_checkpoint_plans_as_one_that_will_be_packed(cpu: float) -> None:
    figures = profile(gpu=None)
    asked = plan("opt-6.7b", cpu, (100, 50, 200), figures=figures, weight_bits=4)
    stored = plan("opt-6.7b", cpu, (100, 50, 200), figures=figures, packed=True)
    assert asked.memory == stored.memory
    assert asked.predicted == stored.predicted


def test_auto_chooses_four_bits_where_the_disk_binds_and_sixteen_where_products_do() -> None:
    slow_disk = profile(gpu=None, read=3e8)
    bound = plan("opt-6.7b", 6, (64, 64, 40), figures=slow_disk, weight_bits=None)
    assert bound.weight_bits == 4
    assert (
        bound.predicted["throughput_tok_s"]
        >= plan("opt-6.7b", 6, (64, 64, 40), figures=slow_disk).predicted["throughput_tok_s"]
    )
    room = plan("opt-1.3b", 100, (64, 64, 400), figures=profile(gpu=None), weight_bits=None)
    assert (room.weight_bits, room.weights_dtype) == (16, "float32")


def test_slow_unpacking_costs_and_can_outweigh_fewer_bytes() -> None:
    figures = profile(gpu=None, read=1.2e9)
    fast, slow, hopeless = (
        plan("opt-6.7b", 6, (64, 64, 8), figures=with_unpacking(figures, rate), weight_bits=4).predicted["sweep_s"]
        for rate in (1e11, 1e9, 1e8)
    )
    assert fast < slow < hopeless
    chosen = plan("opt-6.7b", 6, (64, 64, 8), figures=with_unpacking(figures, 5e7), weight_bits=None)
    assert chosen.weight_bits == 16
