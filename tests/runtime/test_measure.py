"""Measuring a machine: when samples suffice, what is counted, what is left behind, and when the cache holds."""

from __future__ import annotations

import gc
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexbatch.errors import DoesNotFitError, UsageError
from flexbatch.kernels.attention import attend as real_attend
from flexbatch.memory.direct import DirectReader, ReadPlan
from flexbatch.policy.machines import load_profile
from flexbatch.policy.profile import OPTIONAL_FIGURES, HardwareProfile, parse_profile
from flexbatch.runtime import hardware, probes, processor_probes, profile_cache
from flexbatch.runtime.device import CpuDevice, SimDevice
from flexbatch.runtime.measure import FULL, QUICK, Effort, measure
from flexbatch.runtime.probes import Probe, Sizes, Stopwatch, copies, disk
from flexbatch.runtime.processor_probes import Bench, attention, products, steps, widening
from flexbatch.runtime.steady import Patience, relative_spread, steady
from flexbatch.units import MIB

TINY = Effort(
    rows=(1, 64),
    other_rows=(1,),
    types=("bfloat16",),
    patience=Patience(0.5, 2, 0.03),
    disk=Patience(0.5, 2, 0.05),
    pool=4 * MIB,
    file=4 * MIB,
    piece=MIB,
    may_assume=False,
)


class FakeClock:
    """Every sample takes the seconds it returns."""

    def __init__(self, samples: list[float]) -> None:
        self.now = 0.0
        self.taken = 0
        self._samples = samples

    def __call__(self) -> float:
        return self.now

    def sample(self) -> float:
        value = self._samples[min(self.taken, len(self._samples) - 1)]
        self.taken += 1
        self.now += value
        return value


def test_stable_samples_end_early_and_the_first_one_does_not_count() -> None:
    clock = FakeClock([9.0, 1.0, 1.01, 0.99, 1.0, 1.0, 1.0, 1.0])
    found = steady(clock.sample, Patience(0.02, 5, 1000), clock)
    assert found.value == 1.0
    assert found.count == 5
    assert clock.taken == 6
    assert found.spread <= 0.02


def test_restless_samples_end_with_the_time() -> None:
    clock = FakeClock([1.0, *(1.0 + number % 2 for number in range(100))])
    found = steady(clock.sample, Patience(0.001, 3, 30), clock)
    assert 30 <= clock.now < 33
    assert found.count == clock.taken - 1
    assert found.spread > 0.001


def test_one_sample_counts_even_when_there_is_no_time() -> None:
    clock = FakeClock([5.0, 7.0])
    found = steady(clock.sample, Patience(0.1, 5, 1), clock)
    assert (found.value, found.count, found.spread) == (7.0, 1, math.inf)


def test_the_spread_is_that_of_a_box_plots_notch() -> None:
    generator = np.random.default_rng(0)
    for count in (2, 3, 10, 57):
        samples = generator.lognormal(size=count)
        low, high = np.percentile(samples, [25, 75])
        expected = 1.57 * (high - low) / count**0.5 / np.median(samples)
        assert relative_spread(samples.tolist()) == pytest.approx(expected)


def test_the_median_of_noisy_samples_lies_within_the_spread() -> None:
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        samples = iter(generator.normal(1.0, 0.2, size=2000).tolist())
        found = steady(samples.__next__, Patience(0.03, 5, 1e9), lambda: 0.0)
        inside += abs(found.value - 1) <= found.spread
    assert inside > 160


# --- what a figure counts ----------------------------------------------------------------------------------------


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work takes one second, so that a rate is what was counted."""

    def seconds(self: Stopwatch, work: Callable[[int], None]) -> float:
        work(0)
        return 1.0

    monkeypatch.setattr(Stopwatch, "seconds", seconds)


def rates(probe: Probe) -> dict[str, float]:
    with torch.inference_mode():
        return {name: sample() for name, sample in zip(probe.figures, probe.samplers(), strict=False)}


def bench(room: int = 2 * MIB, slowest: float = 1e9) -> Bench:
    return Bench(CpuDevice(), "cpu", room, slowest)


@pytest.mark.usefixtures("one_second")
def test_products_count_two_flops_a_weight_and_row() -> None:
    side = bench().side
    found = rates(products(bench(), torch.float32, (1, 7, 300)))
    assert found == {f"cpu.products.float32.{rows}": 2 * rows * side * side for rows in (1, 7, 300)}
    assert len(bench().weights(torch.float32)) * side * side * 4 == pytest.approx(2 * MIB, rel=0.5)


@pytest.mark.usefixtures("one_second")
def test_a_type_that_is_too_slow_is_not_tried_with_more_rows() -> None:
    side = bench().side
    # One second for the first point is a rate at which 64 rows would take 64 seconds.
    found = rates(products(bench(slowest=10), torch.float32, (1, 64, 65)))
    assert found == {"cpu.products.float32.1": 2 * side * side}


@pytest.mark.usefixtures("one_second")
def test_attention_counts_bytes_of_whole_contexts_and_causal_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def attend(batch: Any, layer: torch.Tensor, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((layer.nbytes, q.shape))
        return real_attend(batch, layer, q, *rest)

    monkeypatch.setattr(processor_probes, "attend", attend)
    found = rates(attention(bench(16 * MIB), torch.float32))
    (nbytes, (rows, heads, dim)), (_, (tokens, _, _)) = seen
    assert found["cpu.attention_bytes"] == nbytes
    assert rows > 1
    pairs = sum(position + 1 for position in range(tokens // 2)) + sum(
        position + 1 for position in range(tokens // 2, tokens)
    )
    assert found["cpu.attention_flops"] == 4 * heads * dim * pairs


def test_widening_is_the_difference_of_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([2.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(Stopwatch, "seconds", lambda *_: next(answers))
    sample = next(iter(widening(bench(), torch.float16).samplers()))
    weights = bench().side ** 2
    assert sample() == weights / 0.5
    assert sample() == weights / (2.0 / 50)  # not less than nothing


def test_a_step_has_a_cost() -> None:
    (rate,) = rates(steps(bench(), torch.float32)).values()
    assert 1e-6 < 1 / rate < 1e-2


def test_short_work_is_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls = 0

    def work(number: int) -> None:
        nonlocal now, calls
        now += 1e-5
        calls += 1

    monkeypatch.setattr("flexbatch.runtime.probes.time.perf_counter", lambda: now)
    watch = Stopwatch(CpuDevice(), "cpu")
    assert watch.seconds(work) == pytest.approx(1e-5)
    before = calls
    watch.seconds(work)
    assert 400 <= calls - before <= 1000


def test_what_was_not_written_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: list[int] = []
    real = DirectReader.read

    def read(self: DirectReader, plan: ReadPlan, buffer: torch.Tensor, offset: int = 0) -> int:
        offsets.append(plan.extents[0].offset)
        count = real(self, plan, buffer, offset)
        assert bool(buffer.any())
        return count

    monkeypatch.setattr(DirectReader, "read", read)
    samplers = disk(tmp_path, Sizes(64 * MIB, 8 * MIB, MIB), None, None).samplers()
    write = next(samplers)
    for _ in range(3):
        write()
    take = next(samplers)
    for _ in range(5):
        take()
    assert offsets == [0, MIB, 2 * MIB, 0, MIB]
    assert list(tmp_path.iterdir()) == []  # the file has no name, even while it is there
    assert list(samplers) == []


def test_throttled_links_are_measured_as_slow_as_they_are(tmp_path: Path) -> None:
    device = SimDevice(64 * MIB, {"h2d": 4e8, "d2h": 2e8})
    sizes = Sizes(64 * MIB, 8 * MIB, 4 * MIB)
    found = {}
    for probe in (copies(device, sizes), disk(tmp_path, sizes, 1e8, 5e7)):
        for name, sample in zip(probe.figures, probe.samplers(), strict=True):
            found[name] = statistics.median(sample() for _ in range(3))
    wanted = {"links.h2d": 4e8, "links.d2h": 2e8, "links.disk_read": 1e8, "links.disk_write": 5e7}
    assert found.keys() == wanted.keys()
    for name, rate in wanted.items():  # a busy machine may be slower than the throttle
        assert 0.3 * rate < found[name] < 1.15 * rate


# --- the whole ---------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(profile_cache.NAMED, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(profile_cache, "_EFFORTS", {"full": TINY, "quick": replace(TINY, types=(), may_assume=True)})
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def test_a_machine_without_a_gpu(home: Path) -> None:
    told: list[tuple[int, int]] = []
    profile = measure(CpuDevice(), home, effort=TINY, progress=lambda *told_: told.append(told_[1:]))
    assert profile.gpu is None
    assert set(profile.memory) == {"cpu", "disk"}
    assert {dtype: [rows for rows, _ in curve.points] for dtype, curve in profile.cpu.products.items()} == {
        "float32": [1, 64],
        "bfloat16": [1],
    }
    assert parse_profile(json.loads(json.dumps(profile.to_json())), "x") == profile
    assert_every_figure_has_a_source(profile)
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert list(home.iterdir()) == []


def test_a_simulated_gpu_gives_its_memory_back(home: Path) -> None:
    device = SimDevice(32 * MIB, {"h2d": 4e8})
    profile = measure(device, home, rates={"disk_write": 5e7}, effort=TINY)
    gc.collect()
    assert device.ledger.used == 0
    assert device.ledger.peak <= 32 * MIB
    assert profile.gpu == profile.cpu
    assert profile.memory["gpu"] == 32 * MIB
    # A busy machine may be slower than the throttle.
    assert 0 < profile.links["h2d"] < 1.1 * 4e8
    assert 0 < profile.links["disk_write"] < 1.1 * 5e7
    assert_every_figure_has_a_source(profile)


def assert_every_figure_has_a_source(profile: HardwareProfile) -> None:
    value = profile.to_json()
    names = {f"{part}.{name}" for part in ("memory", "links") for name in value[part]}
    for tier in ("gpu", "cpu"):
        if tier in value:
            names |= {f"{tier}.{name}" for name in ("attention_bytes", "attention_flops", *OPTIONAL_FIGURES, "step_s")}
            names |= {f"{tier}.{kind}.{name}" for kind in ("products", "widened") for name in value[tier][kind]}
            names |= {f"{tier}.{name}" for name in ("attend_s", "loose") if name in value[tier]}
    assert value["cpu"]["attend_s"] > 0
    assert ("loose" in value["cpu"]) == ("gpu" not in value)
    assert names == set(profile.sources)


def test_a_gpu_with_hardly_any_memory(home: Path) -> None:
    device = SimDevice(2 * MIB)
    profile = measure(device, home, effort=replace(TINY, may_assume=True))
    assert profile.processor("gpu").attention_bytes > 0
    gc.collect()
    assert device.ledger.used == 0


def test_a_disk_without_room_stops_a_measurement_but_not_a_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Iterator[Any]:
        raise DoesNotFitError("full", tier="disk", missing=1, remedy="--disk-dir")

    monkeypatch.setattr(probes, "SpillFile", full)
    with pytest.raises(DoesNotFitError):
        measure(CpuDevice(), home, effort=TINY)
    profile = measure(CpuDevice(), home, effort=replace(TINY, may_assume=True))
    assert profile.links["disk_read"] == 100e6
    assert profile.sources["links.disk_read"].startswith("assumed")


def test_the_efforts_that_people_get() -> None:
    assert (FULL.may_assume, QUICK.may_assume) == (False, True)
    assert max(FULL.rows) == 2048
    figures = len(QUICK.rows) + 8
    assert figures * QUICK.patience.seconds + 2 * QUICK.disk.seconds < 3


# --- the cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the efforts that were spent; measuring is instant."""
    spent: list[str] = []
    template = measure(CpuDevice(), home, effort=TINY)

    def fake(device: Any, folder: Path, *, types: Any, effort: Effort, **_: Any) -> HardwareProfile:
        spent.append("quick" if effort.may_assume else "full")
        found = dict.fromkeys(("float32", *types), template.cpu.products["float32"])
        return replace(template, cpu=replace(template.cpu, products=found), name=f"measurement {len(spent)}")

    monkeypatch.setattr(profile_cache, "measure", fake)
    return spent


def test_a_run_measures_once_and_a_thorough_measurement_wins(home: Path, counted: list[str]) -> None:
    first = profile_cache.machine_profile(CpuDevice(), home)
    assert profile_cache.machine_profile(CpuDevice(), home).name == first.name
    assert counted == ["quick"]
    assert profile_cache.profile_machine(CpuDevice(), home).name == "measurement 2"
    assert profile_cache.machine_profile(CpuDevice(), home).name == "measurement 2"
    assert counted == ["quick", "full"]


def test_a_type_that_was_not_measured_is_measured(home: Path, counted: list[str]) -> None:
    profile_cache.machine_profile(CpuDevice(), home)
    assert profile_cache.cached_profile(CpuDevice(), home, types=("bfloat16",)) is None
    assert "bfloat16" in profile_cache.machine_profile(CpuDevice(), home, types=("bfloat16",)).cpu.products
    profile_cache.machine_profile(CpuDevice(), home, types=("bfloat16",))
    assert counted == ["quick", "quick"]


@pytest.mark.parametrize("part", ["cpu_model", "usable_cores", "torch.get_num_threads", "torch.__version__"])
def test_other_hardware_is_noticed(home: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    profile_cache.machine_profile(CpuDevice(), home)
    other: Any = "another" if part.endswith("version__") else (lambda: 12345)
    monkeypatch.setattr(f"flexbatch.runtime.profile_cache.{part}", other)
    assert profile_cache.cached_profile(CpuDevice(), home) is None


def test_another_device_disk_or_throttle_is_noticed(home: Path, counted: list[str]) -> None:
    profile_cache.machine_profile(CpuDevice(), home)
    assert profile_cache.cached_profile(CpuDevice(), home, rates={"disk_read": 1e6}) is None
    assert profile_cache.cached_profile(SimDevice(MIB), home) is None
    assert profile_cache.cached_profile(CpuDevice(), Path("/dev/shm")) is None
    assert profile_cache.cached_profile(CpuDevice(), home) is not None


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"fingerprint": 1, "profile": 2}', b"\xff"])
def test_a_damaged_cache_is_measured_again(home: Path, counted: list[str], damage: bytes) -> None:
    profile_cache.machine_profile(CpuDevice(), home)
    (path,) = (home.parent / "cache" / "flexbatch" / "profiles").iterdir()
    path.write_bytes(damage)
    assert profile_cache.machine_profile(CpuDevice(), home).name == "measurement 2"


def test_a_cache_that_cannot_be_written_is_let_be(
    home: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parent / "file"))
    assert profile_cache.machine_profile(CpuDevice(), home).name == "measurement 1"


def test_capacities_are_those_of_now(home: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    profile_cache.machine_profile(CpuDevice(), home)
    monkeypatch.setattr(profile_cache, "tier_capacities", lambda *_: {"cpu": 7, "disk": 8})
    assert profile_cache.machine_profile(CpuDevice(), home).memory == {"cpu": 7, "disk": 8}


def test_a_folder_that_fails_is_the_users(home: Path) -> None:
    with pytest.raises(UsageError, match="--disk-dir"):
        measure(CpuDevice(), home / "missing", effort=TINY)


def test_a_named_profile_is_taken_instead(home: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(profile_cache.NAMED, "t4")
    named = profile_cache.machine_profile(CpuDevice(), home)
    assert (named.links["disk_read"], counted) == (load_profile("t4").links["disk_read"], [])
    assert named.memory["cpu"] == hardware.tier_capacities(CpuDevice(), home)["cpu"], "capacities are those of now"
