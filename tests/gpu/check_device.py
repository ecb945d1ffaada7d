"""The CUDA device on a GPU: registered memory, ordered copies, lifetimes, budget; run by ``scripts/gpu_test``."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from flexbatch.errors import DoesNotFitError
from flexbatch.runtime.cuda import CudaDevice, pick_device
from flexbatch.runtime.device import Completion
from flexbatch.scheduler.steps import Resource
from flexbatch.units import MIB

LONG = 200_000_000  # clock ticks that a stream is held up: about a tenth of a second


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice(0, 2048 * MIB)
    yield device
    device.close()


def marked(device: CudaDevice, resource: Resource) -> Completion:
    """The completion of a stream, which always has one."""
    completion = device.mark(resource)
    assert completion is not None
    return completion


def test_auto_is_cuda() -> None:
    device = pick_device("auto")
    assert device.name == "cuda"
    assert device.torch_device == torch.device("cuda:0")
    device.close()


def test_host_buffers_are_registered(device: CudaDevice) -> None:
    buffer = device.host_buffer(10 * MIB + 5)
    assert buffer.is_pinned()
    assert buffer[4096:].is_pinned()
    kept = device.host_buffer(MIB)
    device.close()
    assert not kept.is_pinned()
    kept.fill_(1)


def test_copies_there_and_back(device: CudaDevice) -> None:
    source, back = device.host_buffer(64 * MIB), device.host_buffer(64 * MIB)
    source.random_(0, 256)
    gpu = device.gpu_buffer(64 * MIB)
    with device.lane("h2d"):
        device.copy(gpu, source, "h2d")
    arrived = marked(device, "h2d")
    device.after("d2h", arrived)
    with device.lane("d2h"):
        device.copy(back, gpu, "d2h")
    returned = marked(device, "d2h")
    returned.wait()
    assert torch.equal(back, source)


def test_issuing_does_not_block_and_order_holds(device: CudaDevice) -> None:
    gpu, host = device.gpu_buffer(MIB), device.host_buffer(MIB)
    for turn in range(20):
        start = time.perf_counter()
        with device.lane("gpu"):
            torch.cuda._sleep(LONG // 10)
            gpu.fill_(turn)
        made = marked(device, "gpu")
        device.after("d2h", made)
        with device.lane("d2h"):
            device.copy(host, gpu, "d2h")
        copied = marked(device, "d2h")
        issued = time.perf_counter() - start
        device.after("cpu", copied)
        waited = time.perf_counter() - start
        assert host.eq(turn).all()
        assert turn == 0 or issued < waited / 2
        device.after("gpu", copied)


def test_what_is_dropped_after_its_copy_was_issued_still_arrives(device: CudaDevice) -> None:
    host = device.host_buffer(8 * MIB)
    for turn in range(20):
        with device.lane("gpu"):
            made = torch.full((8 * MIB,), turn, dtype=torch.uint8, device=device.torch_device)
        completion = marked(device, "gpu")
        device.after("d2h", completion)
        with device.lane("d2h"):
            torch.cuda._sleep(LONG // 20)
            device.copy(host, made, "d2h")
        del made
        with device.lane("gpu"):
            torch.full((8 * MIB,), 255, dtype=torch.uint8, device=device.torch_device)  # would take the same memory
        device.synchronize()
        assert host.eq(turn).all()


def test_what_was_made_in_the_lane_of_the_copy_is_not_overwritten_while_in_use(device: CudaDevice) -> None:
    host, sums = device.host_buffer(8 * MIB), []
    for turn in range(20):
        host.fill_(turn)
        with device.lane("h2d"):
            made = torch.empty(8 * MIB, dtype=torch.uint8, device=device.torch_device)
            device.copy(made, host, "h2d")
        arrived = marked(device, "h2d")
        device.after("gpu", arrived)
        with device.lane("gpu"):
            torch.cuda._sleep(LONG // 20)
            sums.append(made.sum(dtype=torch.int64))
        del made
        with device.lane("h2d"):
            torch.full((8 * MIB,), 255, dtype=torch.uint8, device=device.torch_device)  # would take the same memory
        arrived.wait()
    device.synchronize()
    assert [int(total) for total in sums] == [turn * 8 * MIB for turn in range(20)]


def test_a_buffer_that_is_dropped_waits_for_its_copy(device: CudaDevice) -> None:
    gpu, host = device.gpu_buffer(64 * MIB), device.host_buffer(64 * MIB)
    host.fill_(7)
    with device.lane("h2d"):
        torch.cuda._sleep(LONG)
        device.copy(gpu, host, "h2d")
    del host
    assert int(gpu.sum(dtype=torch.int64)) == 7 * 64 * MIB


def test_worker_threads_have_lanes_of_their_own(device: CudaDevice) -> None:
    rng = random.Random(0)
    hosts = [device.host_buffer(4 * MIB) for _ in range(8)]
    for number, host in enumerate(hosts):
        host.fill_(number)
    gpu = device.gpu_buffer(4 * MIB)
    sums: list[tuple[torch.Tensor, Completion]] = []
    done: list[Completion] = []

    def load() -> None:
        with device.lane("h2d"):
            for host in hosts:
                turn = len(done)
                while len(sums) < turn:
                    time.sleep(0.001)
                if sums:
                    device.after("h2d", sums[-1][1])
                torch.cuda._sleep(rng.randrange(LONG // 100))
                device.copy(gpu, host, "h2d")
                done.append(marked(device, "h2d"))

    worker = threading.Thread(target=load)
    worker.start()
    with device.lane("gpu"):
        for turn in range(len(hosts)):
            while len(done) <= turn:
                time.sleep(0.001)
            device.after("gpu", done[turn])
            total = gpu.sum(dtype=torch.int64)
            sums.append((total, marked(device, "gpu")))
    worker.join()
    device.synchronize()
    assert [int(total) for total, _ in sums] == [number * 4 * MIB for number in range(8)]


def test_the_budget_is_kept(device: CudaDevice) -> None:
    buffer = device.gpu_buffer(1024 * MIB)
    with pytest.raises(DoesNotFitError, match="--gpu-memory"):
        device.gpu_buffer(1025 * MIB)
    with device.lane("gpu"), pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(1100 * MIB, dtype=torch.uint8, device=device.torch_device)
    view = buffer[:10]
    del buffer
    assert device.ledger.used == 1024 * MIB
    del view
    device.ledger.check_idle()


def test_more_than_the_gpu_has_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="--gpu-memory"):
        CudaDevice(0, 2**50)
