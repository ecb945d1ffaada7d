"""What the executor asks of a machine, as one protocol, and the two devices that need no GPU.

Knows lanes, completions, buffers and copies; not what a Step does.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from flexbatch.errors import InternalError
from flexbatch.memory.aligned import aligned_buffer
from flexbatch.memory.ledger import Ledger
from flexbatch.scheduler.steps import Resource


class Completion(Protocol):
    """A point in the work of one resource."""

    def wait(self) -> None:
        """Block the calling thread until the work before this point is done."""


class Device(Protocol):
    """Where products run and how bytes get there.

    A resource is either the host's (its Steps are done when their handler returns) or the device's (their handler
    only issues them, and ``mark`` says when they are done).
    """

    name: str
    """``cpu``, ``sim`` or ``cuda``."""
    model: str
    """What the GPU is called, and how many there are; empty without one."""
    compute: Resource
    """Where project, finish and head run: ``cpu`` or ``gpu``."""
    torch_device: torch.device
    """Where their operands live."""

    native_half: bool
    """Whether products of 16-bit types are fast and accurate enough to be the default."""

    moved: dict[str, int]
    """Bytes copied so far on ``h2d`` and ``d2h``."""

    @property
    def gpu_peak(self) -> int:
        """The most bytes that the GPU tier has held."""

    @property
    def gpu_budget(self) -> int:
        """Bytes of the GPU tier; 0 without one."""

    @property
    def gpu_total(self) -> int:
        """Bytes of memory that the GPU has, whoever uses them; 0 without one."""

    def lane(self, resource: Resource) -> AbstractContextManager[None]:
        """What a thread enters to carry out the Steps of ``resource`` (CUDA: its stream)."""

    def after(self, resource: Resource, completion: Completion) -> None:
        """Let what ``resource`` does next wait for ``completion``: a stream by itself, a host resource by blocking."""

    def mark(self, resource: Resource) -> Completion | None:
        """Return the completion of all that was issued on ``resource`` so far, or None if it is done already."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes] in RAM that starts at a page and that copies reach directly; gone when dropped."""

    def gpu_buffer(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes] on the GPU tier; gone when dropped."""

    def copy(self, target: Tensor, source: Tensor, resource: Resource) -> None:
        """Copy ``source`` to ``target`` of the same shape and dtype on ``h2d`` or ``d2h``, in the current lane."""

    def synchronize(self) -> None:
        """Block until all that was issued is done."""

    def close(self) -> None:
        """Let go of the device."""


class _HostDevice:
    """What devices have in common whose every resource is the host's."""

    torch_device = torch.device("cpu")
    native_half = False
    model = ""
    gpu_peak = 0
    gpu_budget = 0
    gpu_total = 0

    def __init__(self) -> None:
        self.moved = {"h2d": 0, "d2h": 0}

    def lane(self, resource: Resource) -> AbstractContextManager[None]:  # noqa: ARG002  part of the protocol
        """Nothing to enter."""
        return nullcontext()

    def after(self, resource: Resource, completion: Completion) -> None:  # noqa: ARG002  part of the protocol
        """Block until ``completion``."""
        completion.wait()

    def mark(self, resource: Resource) -> Completion | None:  # noqa: ARG002  part of the protocol
        """Return None: a handler that has returned has done its work."""
        return None

    def host_buffer(self, nbytes: int) -> Tensor:
        """Return zeros, uint8 [nbytes], page aligned; the kernel provides the memory when it is first touched."""
        return aligned_buffer(nbytes)

    def copy(self, target: Tensor, source: Tensor, resource: Resource) -> None:  # noqa: ARG002  part of the protocol
        """Copy ``source`` to ``target`` before returning."""
        move(target, source)

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """Nothing to let go of."""


class CpuDevice(_HostDevice):
    """Products on the CPU, and no GPU tier."""

    name = "cpu"
    compute: Resource = "cpu"

    def gpu_buffer(self, nbytes: int) -> Tensor:
        """Raise InternalError: a plan for this device has nothing on the GPU tier."""
        raise InternalError(f"{nbytes} bytes were asked of the gpu tier, which the cpu device has not")


class SimDevice(_HostDevice):
    """A GPU played by the CPU: its tier is a capped pool of RAM of its own, its links carry real copies.

    ``rates`` are the bytes/s of ``h2d`` and ``d2h``; a link that is not named is as fast as it is. ``ledger`` counts
    the GPU tier.
    """

    name = "sim"
    model = "a GPU played by the CPU"
    compute: Resource = "gpu"

    def __init__(self, gpu_budget: int, rates: Mapping[Resource, float] | None = None) -> None:
        super().__init__()
        self.ledger = Ledger("gpu", gpu_budget)
        self._rates = dict(rates or {})
        assert all(rate > 0 for rate in self._rates.values())

    @property
    def gpu_peak(self) -> int:  # type: ignore[override]
        """The most bytes that the GPU tier has held."""
        return self.ledger.peak

    @property
    def gpu_budget(self) -> int:  # type: ignore[override]
        """Bytes of the GPU tier."""
        return self.ledger.budget

    @property
    def gpu_total(self) -> int:  # type: ignore[override]
        """Bytes of the GPU tier: there is no more."""
        return self.ledger.budget

    def gpu_buffer(self, nbytes: int) -> Tensor:
        """Return zeros, uint8 [nbytes]; raise DoesNotFitError if the GPU tier has fewer left.

        The bytes count until the last tensor that views them is gone.
        """
        self.ledger.take(nbytes, "a buffer on the GPU")
        try:
            pages = aligned_buffer(nbytes).numpy()
        except BaseException:
            self.ledger.give(nbytes)
            raise
        # Tensors come and go as views; this array lives as long as the storage they share.
        weakref.finalize(pages, self.ledger.give, nbytes).atexit = False
        return torch.from_numpy(pages)

    def copy(self, target: Tensor, source: Tensor, resource: Resource) -> None:
        """Copy ``source`` to ``target``; return no sooner than the link's rate allows."""
        start = time.perf_counter()
        move(target, source)
        self.moved[resource] += target.nbytes
        rate = self._rates.get(resource)
        if rate is None:
            return
        while (early := start + target.nbytes / rate - time.perf_counter()) > 0:
            time.sleep(early)


def move(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` to ``target`` of the same shape and dtype, both in RAM, in the calling thread alone.

    A copy of torch takes all cores, which belong to the products that run meanwhile.
    """
    assert (target.shape, target.dtype) == (source.shape, source.dtype)
    if target.is_contiguous() and source.is_contiguous():
        if target.nbytes:
            ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)
    else:
        target.copy_(source)
