"""The CUDA device, and the choice of a device by its name: the one place that asks whether there is CUDA.

Knows streams, events and registered memory; not what a Step does. Lifetimes: a tensor on the GPU is made in the lane
that first writes to it; ``copy`` tells the allocator that its own lane and ``gpu`` use it, so it may be dropped as soon
as the work on it is issued. A buffer in RAM that is dropped waits for the streams; one that is used again has to wait
for the completions of its copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexbatch.errors import DoesNotFitError, InternalError, UsageError
from flexbatch.memory.aligned import aligned_buffer
from flexbatch.memory.ledger import Ledger
from flexbatch.runtime.device import Completion, CpuDevice, Device, SimDevice
from flexbatch.scheduler.steps import Resource
from flexbatch.units import format_size

_SHARE_OF_FREE = 0.9
_STREAMS: tuple[Resource, ...] = ("gpu", "h2d", "d2h")


@dataclass(frozen=True, slots=True)
class _EventCompletion:
    """A point in a stream."""

    event: torch.cuda.Event

    def wait(self) -> None:
        """Sleep until the stream has passed the point."""
        self.event.synchronize()


class CudaDevice:
    """One CUDA GPU: a stream each for ``gpu``, ``h2d`` and ``d2h``; all other resources are the host's.

    ``gpu_budget`` bytes (90% of what is free unless given) are all that this process takes of the GPU: ``ledger``
    counts the buffers, and torch's allocator is stopped at the same number. Raises DoesNotFitError if the GPU is
    smaller than that.
    """

    name = "cuda"
    compute: Resource = "gpu"
    native_half = True

    def __init__(self, index: int = 0, gpu_budget: int | None = None) -> None:
        self.torch_device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(index)
        budget = int(_SHARE_OF_FREE * free) if gpu_budget is None else gpu_budget
        if budget > total:
            raise DoesNotFitError(
                f"--gpu-memory {format_size(budget)}: {self.torch_device} has {format_size(total)}",
                tier="gpu",
                missing=budget - total,
                remedy="--gpu-memory",
            )
        self.gpu_total = total
        count = torch.cuda.device_count()
        self.model = torch.cuda.get_device_name(index) + (f" (1 of {count})" if count > 1 else "")
        self.ledger = Ledger("gpu", budget)
        torch.cuda.set_per_process_memory_fraction(budget / total, index)
        self._streams = {resource: torch.cuda.Stream(self.torch_device) for resource in _STREAMS}
        self.moved = {"h2d": 0, "d2h": 0}
        torch.cuda.reset_peak_memory_stats(index)
        self._cudart = torch.cuda.cudart()
        self._registered: list[weakref.finalize[[int], np.ndarray[Any, Any]]] = []

    @property
    def gpu_peak(self) -> int:
        """The most bytes that torch's allocator has held since the device was made: buffers and working memory."""
        return torch.cuda.max_memory_reserved(self.torch_device)

    @property
    def gpu_budget(self) -> int:
        """Bytes of the GPU tier."""
        return self.ledger.budget

    def lane(self, resource: Resource) -> AbstractContextManager[None]:
        """Make the stream of ``resource`` the calling thread's, and this GPU its device."""
        stream = self._streams.get(resource)
        return nullcontext() if stream is None else _entered(stream)

    def after(self, resource: Resource, completion: Completion) -> None:
        """Let the stream of ``resource`` wait for ``completion`` by itself; block for a resource of the host."""
        stream = self._streams.get(resource)
        if stream is not None and isinstance(completion, _EventCompletion):
            stream.wait_event(completion.event)
        else:
            completion.wait()

    def mark(self, resource: Resource) -> Completion | None:
        """Record an event on the stream of ``resource``; None for a resource of the host."""
        stream = self._streams.get(resource)
        if stream is None:
            return None
        event = torch.cuda.Event(blocking=True)  # who waits sleeps: the cores have products and copies to do
        event.record(stream)
        return _EventCompletion(event)

    def host_buffer(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes] in RAM, page aligned and registered: copies reach it directly, and all of it is taken.

        Raises DoesNotFitError if the driver refuses. It is unregistered, which is slow, when its last view is dropped,
        or by ``close``.
        """
        buffer = aligned_buffer(nbytes)
        if nbytes == 0:
            return buffer
        pages = buffer.numpy()
        with torch.cuda.device(self.torch_device):
            status = int(self._cudart.cudaHostRegister(buffer.data_ptr(), nbytes, 0))
        if status != 0:
            raise DoesNotFitError(
                f"the CUDA driver cannot register {format_size(nbytes)} of RAM (error {status}): "
                "lower --cpu-memory, or raise the memory limit of the container",
                tier="cpu",
                missing=nbytes,
                remedy="--cpu-memory",
            )
        # Tensors come and go as views; this array lives as long as the storage they share, and dies before its memory.
        finalizer = weakref.finalize(pages, self._unregister, buffer.data_ptr())
        finalizer.atexit = False
        self._registered = [known for known in self._registered if known.alive] + [finalizer]
        return torch.from_numpy(pages)

    def gpu_buffer(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes] on the GPU, not zeroed; raise DoesNotFitError if the budget has fewer left.

        The bytes count until the last tensor that views them is gone. Waits for the compute stream, so that every
        stream may use the buffer at once.
        """
        self.ledger.take(nbytes, "a buffer on the GPU")
        try:
            with self.lane("gpu"):
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
            self._streams["gpu"].synchronize()
        except torch.cuda.OutOfMemoryError as error:
            self.ledger.give(nbytes)
            raise DoesNotFitError(
                f"a buffer on the GPU: {format_size(nbytes)}, but {self.torch_device} has no room left for it, since "
                "working memory or other programs have taken it: lower --gpu-memory",
                tier="gpu",
                missing=nbytes,
                remedy="--gpu-memory",
            ) from error
        except BaseException:
            self.ledger.give(nbytes)
            raise
        weakref.finalize(buffer.untyped_storage(), self.ledger.give, nbytes).atexit = False
        return buffer

    def copy(self, target: Tensor, source: Tensor, resource: Resource) -> None:
        """Issue a copy in the lane of ``resource``, which the calling thread has entered.

        It overlaps other work if the side in RAM is contiguous and of ``host_buffer``; else the thread waits for it.
        """
        assert target.shape == source.shape
        assert target.dtype == source.dtype
        target.copy_(source, non_blocking=True)
        self.moved[resource] += target.nbytes
        for tensor in (target, source):
            if tensor.device == self.torch_device:
                tensor.record_stream(self._streams[resource])
                tensor.record_stream(self._streams["gpu"])

    def synchronize(self) -> None:
        """Block until all streams have done what was issued."""
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        """Wait for the streams, unregister the buffers in RAM, and let go of the GPU memory that torch keeps."""
        self.synchronize()
        for unregister in self._registered:
            unregister()
        self._registered = []
        with torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)

    def _unregister(self, address: int) -> None:
        self.synchronize()  # a copy may still be under way
        status = int(self._cudart.cudaHostUnregister(address))
        if status != 0:
            raise InternalError(f"the CUDA driver cannot unregister a buffer in RAM (error {status})")


@contextmanager
def _entered(stream: torch.cuda.Stream) -> Iterator[None]:
    with torch.cuda.stream(stream):
        yield


def pick_device(name: str, gpu_budget: int | None = None, rates: Mapping[Resource, float] | None = None) -> Device:
    """Return the device that ``--device`` names: ``auto`` is CUDA where there is a GPU, else the CPU.

    ``gpu_budget``: bytes of the GPU tier, which ``sim`` cannot do without; ``rates``: of its links, bytes/s. Raises
    UsageError if there is no such device.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CpuDevice()
    if name == "sim":
        if gpu_budget is None:
            raise UsageError("--device sim: say how large its GPU tier is with --gpu-memory")
        return SimDevice(gpu_budget, rates)
    if not torch.cuda.is_available():
        reason = "finds no GPU and driver" if torch.version.cuda else "is built without CUDA"
        raise UsageError(f"--device {name}: PyTorch {torch.__version__} {reason}: use --device cpu")
    count = torch.cuda.device_count()
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise UsageError(f"--device {name}: this machine has {count} CUDA devices, the last is cuda:{count - 1}")
    return CudaDevice(index, gpu_budget)
