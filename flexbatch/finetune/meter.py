"""Counts the bytes that tensors of a computation hold, as they come and go: measured, not estimated.

Every storage that an operation of torch returns counts from then on until it is freed, whoever holds it, autograd
included. Scratch inside of one operation is not seen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ActivationMeter(TorchDispatchMode):
    """While entered, counts storages that operations make; ``ignored`` are tensors whose memory is not counted."""

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used = 0
        self.peak = 0
        self._lock = threading.RLock()  # freeing a storage inside of a count is a count, too
        self._known: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}
        for tensor in ignored:
            self._note(tensor, counted=False)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Carry out one operation and look at what it returns."""
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor):
                self._note(leaf, counted=False)  # what was there before is not ours
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, counted=True)
        return result

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.used += nbytes
            self.peak = max(self.peak, self.used)

    def _note(self, tensor: Tensor, *, counted: bool) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self._count(-self._sizes.pop(key, 0))

        self._known[key] = weakref.ref(storage, gone)
        self._sizes[key] = size
        self._count(size)
