"""CPU and sim devices: buffers, copies, throttled links; and the ledger that counts a tier, to the byte."""

from __future__ import annotations

import mmap
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from flexbatch.errors import DoesNotFitError, ExitCode, InternalError
from flexbatch.memory.ledger import Ledger
from flexbatch.runtime.device import CpuDevice, Device, SimDevice

DEVICES: list[Device] = [CpuDevice(), SimDevice(10**6)]


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "sim"])
def test_host_buffers_start_at_a_page_and_are_gone_when_dropped(device: Device) -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * mmap.PAGESIZE

    for nbytes in (0, 1, 4095, 4096, 100_001):
        buffer = device.host_buffer(nbytes)
        assert (buffer.dtype, buffer.shape) == (torch.uint8, (nbytes,))
        assert nbytes == 0 or buffer.data_ptr() % 4096 == 0
        buffer.fill_(7)
        assert int(buffer.long().sum()) == 7 * nbytes
    before = mapped()
    buffer = device.host_buffer(2**30)
    view = buffer[5000:9000].view(torch.float32)
    assert mapped() > before + 2**29  # others map and unmap, too
    del buffer
    view.fill_(1.0)
    assert mapped() > before + 2**29
    del view
    assert mapped() < before + 2**29


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "sim"])
def test_the_host_needs_no_completions(device: Device) -> None:
    assert device.mark("h2d") is None
    waited = []

    class Late:
        def wait(self) -> None:
            waited.append(True)

    device.after("gpu", Late())
    assert waited == [True]
    with device.lane("gpu"):
        device.synchronize()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "sim"])
def test_copies_of_any_layout(device: Device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, 200, (7, 12), generator=generator).to(dtype)
    target = torch.zeros(7, 12, dtype=dtype)
    device.copy(target, source, "h2d")
    assert torch.equal(target, source)
    columns = torch.zeros(12, 7, dtype=dtype)
    device.copy(columns.T, source, "d2h")
    assert torch.equal(columns, source.T)
    device.copy(target[2:4, 1:5], source[:2, 3:7], "h2d")
    assert torch.equal(target[2:4, 1:5], source[:2, 3:7])
    assert torch.equal(target[4:], source[4:])
    device.copy(target[:0], source[:0], "h2d")


def test_the_cpu_device_has_no_gpu_tier() -> None:
    with pytest.raises(InternalError, match="which the cpu device has not"):
        CpuDevice().gpu_buffer(1)


def test_sim_keeps_its_budget_to_the_byte() -> None:
    device = SimDevice(10_000)
    first = device.gpu_buffer(4_097)
    second = device.gpu_buffer(5_903)
    assert (device.ledger.used, device.ledger.left) == (10_000, 0)
    with pytest.raises(DoesNotFitError, match=r"the gpu tier has 0 B of its 9\.8 KiB left") as caught:
        device.gpu_buffer(1)
    assert (caught.value.tier, caught.value.missing, caught.value.remedy) == ("gpu", 1, "--gpu-memory")
    assert caught.value.exit_code is ExitCode.DOES_NOT_FIT
    view = second[:10].view(torch.int16)
    del second
    assert device.ledger.used == 10_000, "a view still holds the buffer"
    del view
    assert device.ledger.used == 4_097
    with pytest.raises(DoesNotFitError) as caught:
        device.gpu_buffer(6_000)
    assert caught.value.missing == 97
    assert device.gpu_buffer(5_903).shape == (5_903,)
    del first
    device.ledger.check_idle()
    assert device.ledger.peak == 10_000


def test_gpu_buffers_are_memory_of_their_own() -> None:
    device = SimDevice(10_000)
    gpu, host = device.gpu_buffer(5_000), device.host_buffer(5_000)
    host.copy_(torch.arange(5_000) % 251)
    device.copy(gpu, host, "h2d")
    host.zero_()
    back = device.host_buffer(5_000)
    device.copy(back, gpu, "d2h")
    assert torch.equal(back, (torch.arange(5_000) % 251).to(torch.uint8))
    assert gpu.data_ptr() % 4096 == 0


@pytest.mark.parametrize("nbytes", [1_000, 200_000])
def test_a_throttled_copy_takes_bytes_over_rate(nbytes: int) -> None:
    device = SimDevice(nbytes, {"h2d": 4e6})
    gpu, host = device.gpu_buffer(nbytes), device.host_buffer(nbytes).fill_(3)
    start = time.perf_counter()
    for _ in range(3):
        device.copy(gpu, host, "h2d")
    elapsed = time.perf_counter() - start
    assert elapsed >= 3 * nbytes / 4e6
    assert elapsed < 3 * nbytes / 4e6 + 0.5
    assert torch.equal(gpu, host)


def test_only_the_named_link_is_throttled() -> None:
    device = SimDevice(1_000, {"h2d": 10.0})  # 100 s for the buffer
    start = time.perf_counter()
    device.copy(device.host_buffer(1_000), device.gpu_buffer(1_000), "d2h")
    assert time.perf_counter() - start < 5


def test_a_ledger_counts_what_threads_take_and_give() -> None:
    ledger = Ledger("cpu", 10**9)

    def trade(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(3_000):
            nbytes = rng.randint(0, 1_000)
            ledger.take(nbytes, "a page")
            ledger.give(nbytes)
        ledger.take(seed, "what stays")

    threads = [threading.Thread(target=trade, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.used == 1 + 2 + 3 + 4
    assert 10 <= ledger.peak <= 4_010
    ledger.check_idle(held=10)
    with pytest.raises(InternalError, match="the cpu tier holds 10 bytes when idle, 0 are accounted for"):
        ledger.check_idle()


def test_a_ledger_refuses_what_does_not_add_up() -> None:
    ledger = Ledger("disk", 100, remedy="--disk-dir")
    ledger.take(100, "the KV cache")
    with pytest.raises(DoesNotFitError, match="KV pages: 7 B, but the disk tier has 0 B of its 100 B left") as caught:
        ledger.take(7, "KV pages")
    assert (caught.value.tier, caught.value.missing, caught.value.remedy) == ("disk", 7, "--disk-dir")
    assert ledger.used == ledger.peak == 100
    with pytest.raises(InternalError, match="given back 1 bytes more"):
        ledger.give(101)
    ledger.give(100)
    ledger.check_idle()
    with pytest.raises(InternalError, match="-1 bytes"):
        Ledger("gpu", -1)
