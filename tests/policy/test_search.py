"""Whole plans: every byte accounted for, what options fix kept, and clear words where nothing fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexbatch.errors import DoesNotFitError, UsageError
from flexbatch.options import EngineOptions
from flexbatch.policy.plan import Plan
from flexbatch.policy.profile import Curve, HardwareProfile, Processor
from flexbatch.policy.search import choose
from flexbatch.policy.weights import WeightPlacement
from flexbatch.policy.workload import Workload
from flexbatch.units import Shares, format_size
from tests.policy.cases import machine, model, profile, random_shop


def plan(
    name: str, gpu: float, cpu: float, job: tuple[int, int, int], *, device: bool = True, **options: Any
) -> tuple[Plan, WeightPlacement]:
    size, units = model(name)
    figures = profile() if device else profile(gpu=None)
    budgets = machine(figures, gpu, cpu, options.pop("disk", 1000.0))
    return choose(
        name,
        size,
        units,
        Workload.uniform(*job),
        EngineOptions(**options),
        budgets,
        figures,
        stored_dtype=size.shape.stored_dtype,
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_keeps_its_budgets_and_its_options(seed: int) -> None:
    shop = random_shop(1000 + seed)
    try:
        found, placement = choose(
            shop.name,
            shop.size,
            shop.units,
            shop.workload,
            shop.options,
            shop.machine,
            shop.profile,
            stored_dtype=shop.stored_dtype,
        )
    except DoesNotFitError:
        pytest.skip("nothing fits")
    for tier, used in found.memory.items():
        assert used.total <= used.budget, tier
    assert set(placement.tiers) == {unit.key for unit in shop.units}
    assert found.max_sequences <= min(shop.options.max_sequences or 10**9, shop.workload.num_requests)
    assert (found.weight_bits, found.kv_bits) == (shop.options.weight_bits, shop.options.kv_bits)
    if shop.options.cpu_attention is False:
        assert found.cpu_attention == 0
    if shop.options.cpu_attention:
        assert not found.gpu_attention
    predicted = found.predicted
    assert predicted["throughput_tok_s"] > 0
    assert predicted["bottleneck"] == max(predicted["resource_s"], key=predicted["resource_s"].get)
    assert max(predicted["resource_s"].values()) <= predicted["sweep_s"] * 1.001


def test_everything_on_a_large_gpu() -> None:
    found, _ = plan("opt-1.3b", 40, 60, (100, 50, 500))
    assert found.weights == Shares(1, 0, 0)
    assert found.kv.gpu == 1
    assert found.gpu_ring == found.host_ring == 0


def test_on_a_cpu_that_is_fast_from_128_rows_on_decoding_rows_share_products_with_prompts() -> None:
    """What was measured to be fastest there: some 128 sequences, micro-batches of 512, prompts at the steady pace."""
    size, units = model("opt-125m")
    curve = Curve(((1, 8e9), (16, 6e10), (64, 1.1e11), (128, 1.3e11), (512, 1.4e11), (2048, 1.42e11)))
    cpu = Processor({"float32": curve}, {"float16": 2e9}, 1e10, 5e10, 2e-5)
    figures = HardwareProfile("a CPU", {}, {"disk_read": 1e9, "disk_write": 5e8}, cpu)
    found, _ = choose(
        "opt-125m",
        size,
        units,
        Workload.uniform(128, 64, 1000),
        EngineOptions(),
        machine(figures, 0, 8),
        figures,
        stored_dtype="float16",
    )
    assert found.weights_dtype == "float32"
    assert 64 <= found.max_sequences <= 512
    assert found.micro_batch_tokens >= 512
    # Prompts come in at about the pace at which rows end, not all at once: two prompt tokens a new one.
    assert found.prompt_tokens_per_sweep == pytest.approx(2 * found.max_sequences, abs=256)


def test_a_few_rows_run_together_where_products_gain_by_it() -> None:
    """A product of four rows takes hardly longer than one of a single row."""
    size, units = model("opt-125m")
    cpu = Processor({"float32": Curve(((1, 1e10), (4, 4e10), (64, 1.5e11)))}, {"float16": 5e9}, 1e10, 5e10, 2e-5)
    figures = HardwareProfile("a CPU", {}, {"disk_read": 1e9, "disk_write": 5e8}, cpu)
    job, options, budgets = Workload.uniform(64, 48, 4), EngineOptions(weights=Shares(0, 1, 0)), machine(figures, 0, 8)
    found, _ = choose("opt-125m", size, units, job, options, budgets, figures, stored_dtype="float16")
    assert found.max_sequences == 4


def test_a_short_job_is_no_larger_than_its_rows() -> None:
    found, _ = plan("opt-1.3b", 40, 60, (20, 5, 3))
    assert found.max_sequences <= 3


def test_given_shares_are_kept() -> None:
    options: dict[str, Any] = {
        "weights": Shares(0.2, 0.5, 0.3),
        "kv": Shares(0, 1, 0),
        "hidden": Shares(0, 1, 0),
        "micro_batch": 96,
    }
    found, _ = plan("opt-6.7b", 15, 60, (100, 50, 500), **options)
    assert found.weights.gpu == pytest.approx(0.2, abs=0.03)
    assert found.weights.disk == pytest.approx(0.3, abs=0.03)
    assert (found.kv, found.hidden, found.micro_batch_tokens) == (Shares(0, 1, 0), Shares(0, 1, 0), 96)


def test_a_fixed_block() -> None:
    found, _ = plan("opt-6.7b", 15, 60, (100, 50, 500), schedule="block", micro_batch=8)
    assert found.micro_batch_sequences == 8
    assert sum(found.kv_pages.values()) >= found.max_sequences * 3


def test_nothing_fits() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan("opt-30b", 0, 0.2, (100, 50, 5), device=False)
    error = caught.value
    assert error.tier == "cpu"
    assert error.remedy == "--cpu-memory"
    assert "\n" not in str(error)
    found, _ = plan("opt-30b", 0, 0.2 + error.missing / 1e9 + 1e-3, (100, 50, 5), device=False)
    assert found.max_sequences >= 1


@pytest.mark.parametrize("taken", [50_000_000, 900_000_000])
def test_what_is_kept_for_something_else_counts_in_the_remedy(taken: int) -> None:
    """Less than there is, and more."""
    size, units = model("llama-2-7b")
    figures = profile(gpu=None)

    def chosen(there: int) -> Plan:
        budgets = machine(figures, 0, there / 1e9, 1000.0).without("cpu", taken)
        job = Workload.uniform(100, 50, 5)
        return choose("m", size, units, job, EngineOptions(), budgets, figures, stored_dtype="float16")[0]

    with pytest.raises(DoesNotFitError) as caught:
        chosen(300_000_000)
    assert f"which has {format_size(300_000_000)}: " in str(caught.value)
    enough = 300_000_000 + caught.value.missing
    assert f"raise --cpu-memory to {format_size(enough)}" in str(caught.value)
    assert chosen(enough + 10).max_sequences >= 1


def test_a_gpu_share_without_a_gpu() -> None:
    with pytest.raises(
        UsageError, match=r"^--kv: this device has no GPU, so its gpu share must be 0: use e.g. 0,100,0$"
    ):
        plan("opt-125m", 0, 8, (10, 10, 10), device=False, kv=Shares(1, 0, 0))


@pytest.mark.parametrize("device", [True, False])
@pytest.mark.parametrize(
    "job", [(1, 1, 1), (5, 1, 1), (3, 1, 2), (200, 2, 2), (1, 300, 1), (400, 1, 3), (2, 2, 4), (50, 0, 9)]
)
def test_jobs_of_a_few_short_rows_have_plans(device: bool, job: tuple[int, int, int]) -> None:
    for options in ({}, {"schedule": "block"}, {"overlap": False}):
        found, _ = plan("opt-125m", 8, 16, job, device=device, **options)
        assert 1 <= found.max_sequences <= job[2]
        assert found.predicted["throughput_tok_s"] > 0


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_weights_in_ram_are_converted_once_also_to_a_type_that_is_no_wider(stored: str) -> None:
    size, units = model("opt-125m")
    figures = profile(gpu=None)
    budgets = replace(machine(figures, 0, 8), dtype="bfloat16")
    job = Workload.uniform(128, 64, 1000)
    found, _ = choose("opt-125m", size, units, job, EngineOptions(), budgets, figures, stored_dtype=stored)
    assert found.weights_dtype == "bfloat16"
