"""Hidden states of waiting micro-batches: takes them to where they rest between layers, and back.

Carries out the ``hidden_*`` Steps, and the transfers of q, k, v and the attended heads, which are of the same kind.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from flexbatch.memory.aligned import align_up
from flexbatch.memory.spill import SpillFile
from flexbatch.runtime.device import Device
from flexbatch.runtime.micro_batch import MicroBatchState


class HiddenMoves:
    """Moves tensors of micro-batches between the GPU, RAM and a spill file.

    Host buffers are kept for the next tensor of the same size. ``base`` is where hidden states begin in ``file``.
    """

    def __init__(self, device: Device, file: SpillFile | None, base: int) -> None:
        self._device = device
        self._file = file
        self._base = base
        self._spare: dict[int, list[Tensor]] = defaultdict(list)

    def up(self, state: MicroBatchState) -> None:
        """RAM to GPU."""
        assert state.raw is not None
        state.x = self._to_gpu(self._typed(state.raw, state))
        state.leaving, state.raw = state.raw, None  # the copy may still read it

    def down(self, state: MicroBatchState) -> None:
        """GPU to RAM."""
        x = state.hidden().contiguous()
        self.settle(state)
        state.raw = self._take(x.nbytes)
        self._device.copy(self._typed(state.raw, state), x, "d2h")
        state.x = None

    def settle(self, state: MicroBatchState) -> None:
        """Take back the buffer of a copy to the GPU that a later Step of the same micro-batch has waited for."""
        if state.leaving is not None:
            self._give(state.leaving)
            state.leaving = None

    def read(self, state: MicroBatchState) -> None:
        """Disk to RAM, where a GPU's or the CPU's next Step takes it up."""
        assert self._file is not None
        state.raw = self._take(state.hidden_bytes)
        self._file.read(self._base + state.hidden_offset, state.raw)
        if self._device.compute == "cpu":
            state.x = self._typed(state.raw, state)

    def write(self, state: MicroBatchState) -> None:
        """RAM to disk."""
        assert self._file is not None
        if self._device.compute == "cpu":
            x = state.hidden()
            if state.raw is None:
                state.raw = self._take(state.hidden_bytes)
            self._typed(state.raw, state).copy_(x)
            state.x = None
        assert state.raw is not None
        self._file.write(self._base + state.hidden_offset, state.raw)
        self._give(state.raw)
        state.raw = None

    def qkv_down(self, state: MicroBatchState) -> None:
        """q, k and v to the host."""
        assert state.qkv is not None
        state.host_parts = [self._take(part.nbytes) for part in state.qkv]
        q, k, v = (self._to_host(part, raw) for part, raw in zip(state.qkv, state.host_parts, strict=True))
        state.qkv = (q, k, v)

    def attended_up(self, state: MicroBatchState) -> None:
        """What attention on the host gave, to the GPU."""
        assert state.attended is not None
        state.attended = self._to_gpu(state.attended)
        for raw in state.host_parts:  # attention has read them, or this Step would not run
            self._give(raw)
        state.host_parts = []

    def _to_host(self, tensor: Tensor, raw: Tensor) -> Tensor:
        target = raw[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._device.copy(target, tensor, "d2h")
        return target

    def _to_gpu(self, tensor: Tensor) -> Tensor:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device.torch_device)
        self._device.copy(target, tensor, "h2d")
        return target

    def _typed(self, raw: Tensor, state: MicroBatchState) -> Tensor:
        rows, width = state.hidden_shape
        return raw[: rows * width * state.dtype.itemsize].view(state.dtype).view(rows, width)

    def _take(self, nbytes: int) -> Tensor:
        size = align_up(nbytes)
        try:
            return self._spare[size].pop()  # several lanes take and give: asking first would be a race
        except IndexError:
            return self._device.host_buffer(size)

    def _give(self, raw: Tensor) -> None:
        self._spare[raw.nbytes].append(raw)
