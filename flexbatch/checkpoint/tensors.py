"""What a checkpoint gives to the rest of the program: where each tensor lies, and a way to read it.

Knows dtypes by their safetensors names; no file format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from flexbatch.compression.groups import Packed, PackedLayout

DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The stored dtypes that weights may have."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: ``nbytes`` bytes at ``offset`` of the file ``path``.

    ``path`` is None for a tensor that is made when it is read: up (``dummy``), or from another form (``derived``).
    ``layout`` says how a weight in 4 bits lies in its bytes; its ``dtype`` is then U8, its ``shape`` [out, in] whatever
    the table stores.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path | None
    offset: int
    nbytes: int
    layout: PackedLayout | None = None

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def alignment(self) -> int:
        """Bytes of its widest element: ``view`` wants memory that begins at a multiple of it."""
        return (DTYPES[self.dtype] if self.layout is None else self.layout.scale_type).itemsize

    def piece(self, start: int, stop: int) -> TensorEntry:
        """Return rows ``start .. stop - 1`` of a matrix that is ``divisible``, as an entry of the same name."""
        row = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row, nbytes=(stop - start) * row)

    def view(self, raw: torch.Tensor) -> torch.Tensor | Packed:
        """See uint8 [nbytes], its bytes in memory, as the tensor or the packed weight."""
        return raw.view(DTYPES[self.dtype]).view(self.shape) if self.layout is None else self.layout.view(raw)


class Checkpoint(Protocol):
    """All tensors of a model, by the weight table's full names; tied names share one entry."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Entry of every tensor of the table."""

    @property
    def fingerprint(self) -> str:
        """Stable hash of what decides the results: configuration, headers, sizes, samples of the contents."""

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """Return the tensor in its stored dtype and its own memory (``entry.nbytes`` bytes); not of a packed weight."""

    def raw(self, entry: TensorEntry) -> torch.Tensor:
        """Return the bytes that ``entry.view`` sees, uint8 [nbytes] in their own memory."""

    def divisible(self, entry: TensorEntry) -> bool:
        """Whether some rows of the tensor can be read by themselves (see ``TensorEntry.piece``)."""

    def at_rest(self, entry: TensorEntry) -> TensorEntry:
        """Return an entry of the same tensor that lies in a file (``path`` is not None), for weights that rest on disk.

        Raises UsageError where it has no bytes to lie anywhere (made-up weights).
        """
