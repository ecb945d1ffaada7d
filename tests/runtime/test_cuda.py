"""The CUDA device against a pretended CUDA runtime: which stream waits for what, what is registered and when not.

What only a real GPU can show is checked by ``scripts/gpu_test``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexbatch.errors import DoesNotFitError, UsageError
from flexbatch.runtime.cuda import CudaDevice, pick_device
from flexbatch.runtime.device import CpuDevice, SimDevice

TOTAL = 1_000_000


class Runtime:
    """Writes down what is asked of CUDA; memory is RAM."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.registered: dict[int, int] = {}
        self.status = 0
        self.streams = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if self.status == 0:
            self.registered[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0

    def stream(self, device: torch.device) -> Any:
        number, self.streams = self.streams, self.streams + 1
        return SimpleNamespace(
            number=number,
            wait_event=lambda event: self.calls.append((number, "waits for", event.number)),
            synchronize=lambda: self.calls.append((number, "synchronized")),
        )

    def event(self, *, blocking: bool) -> Any:
        assert blocking
        event: Any = SimpleNamespace(number=None)
        event.synchronize = lambda: self.calls.append(("host waits for", event.number))
        event.record = lambda stream: setattr(event, "number", stream.number)
        return event

    def entered(self, stream: Any) -> AbstractContextManager[None]:
        self.calls.append((stream.number, "entered"))
        return nullcontext()


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda _: "a GPU",
        "mem_get_info": lambda _: (TOTAL // 2, TOTAL),
        "set_per_process_memory_fraction": lambda share, _: runtime.calls.append(("fraction", share)),
        "reset_peak_memory_stats": lambda _: None,
        "Stream": runtime.stream,
        "Event": runtime.event,
        "stream": runtime.entered,
        "device": lambda _: nullcontext(),
        "cudart": lambda: runtime,
        "empty_cache": lambda: runtime.calls.append(("emptied",)),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return runtime


def test_streams_wait_by_themselves_and_the_host_sleeps(runtime: Runtime) -> None:
    device = CudaDevice()
    with device.lane("h2d"), device.lane("disk_read"):
        pass
    copied = device.mark("h2d")
    assert copied is not None
    device.after("gpu", copied)
    device.after("cpu", copied)
    assert runtime.calls[1:] == [(1, "entered"), (0, "waits for", 1), ("host waits for", 1)]
    assert device.mark("cpu") is device.mark("disk_read") is device.mark("disk_write") is None


def test_host_buffers_are_registered_as_long_as_they_live(runtime: Runtime) -> None:
    device = CudaDevice()
    buffer = device.host_buffer(10_000)
    assert runtime.registered == {buffer.data_ptr(): 10_000}
    assert buffer.data_ptr() % 4096 == 0
    view = buffer[5000:6000].view(torch.float32)
    del buffer
    assert len(runtime.registered) == 1
    runtime.calls.clear()
    del view
    assert runtime.registered == {}
    assert runtime.calls == [(stream, "synchronized") for stream in range(3)]
    kept = device.host_buffer(5_000)
    assert device.host_buffer(0).shape == (0,)
    device.close()
    assert runtime.registered == {}
    assert runtime.calls[-5:-2] == [(stream, "synchronized") for stream in range(3)]
    assert runtime.calls[-2:] == [("emptied",), ("fraction", 1.0)]
    kept.fill_(1)
    del kept


def test_a_refused_registration_is_said(runtime: Runtime) -> None:
    runtime.status = 2
    with pytest.raises(DoesNotFitError, match=r"cannot register 9\.8 KiB of RAM \(error 2\): lower --cpu-memory"):
        CudaDevice().host_buffer(10_000)


def test_gpu_buffers_keep_the_budget(runtime: Runtime) -> None:
    device = CudaDevice(0, 10_000)
    assert runtime.calls == [("fraction", 0.01)]
    device.torch_device = torch.device("cpu")
    buffer = device.gpu_buffer(9_000)
    assert runtime.calls[-2:] == [(0, "entered"), (0, "synchronized")]
    with pytest.raises(DoesNotFitError) as caught:
        device.gpu_buffer(1_001)
    assert (caught.value.tier, caught.value.missing, caught.value.remedy) == ("gpu", 1, "--gpu-memory")
    view = buffer[10:20]
    del buffer
    assert device.ledger.used == 9_000
    del view
    device.ledger.check_idle()


def test_a_full_gpu_is_said_and_nothing_counted(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    device = CudaDevice(0, 10_000)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(DoesNotFitError, match="has no room left for it"):
        device.gpu_buffer(9_000)
    device.ledger.check_idle()


def test_budgets(runtime: Runtime) -> None:
    assert CudaDevice().ledger.budget == int(0.9 * TOTAL / 2)
    with pytest.raises(DoesNotFitError, match=r"--gpu-memory 1\.9 MiB: cuda:1 has 976\.6 KiB") as caught:
        CudaDevice(1, 2 * TOTAL)
    assert caught.value.missing == TOTAL


def test_devices_by_name(runtime: Runtime) -> None:
    assert pick_device("auto", 1_000).torch_device == torch.device("cuda:0")
    assert pick_device("cuda").torch_device == torch.device("cuda:0")
    assert pick_device("cuda:1").torch_device == torch.device("cuda:1")
    assert isinstance(pick_device("cpu"), CpuDevice)
    sim = pick_device("sim", 1_000, {"h2d": 1e9})
    assert isinstance(sim, SimDevice)
    assert sim.ledger.budget == 1_000
    with pytest.raises(UsageError, match="--device cuda:2: this machine has 2 CUDA devices, the last is cuda:1"):
        pick_device("cuda:2")
    with pytest.raises(UsageError, match="--device sim: say how large its GPU tier is with --gpu-memory"):
        pick_device("sim")


@pytest.mark.parametrize(("build", "reason"), [(None, "is built without CUDA"), ("12.8", "finds no GPU and driver")])
def test_without_a_gpu(build: str | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    assert isinstance(pick_device("auto"), CpuDevice)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match=f"--device {name}: PyTorch .* {reason}: use --device cpu"):
            pick_device(name)
