"""One adapter as its files describe it: which modules it changes, by what rank and scale, and where its factors lie.

Plain data; knows no file format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexbatch.errors import AdapterError
from flexbatch.lora.modules import Module


class UnreadableAdapterError(AdapterError):
    """An adapter whose files are missing or damaged: its rows fail, the others go on."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One matrix in the adapter's file: ``nbytes`` bytes at ``offset`` of it, row by row."""

    dtype: str
    shape: tuple[int, int]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """What an adapter adds to one module: ``scale * b @ a``, a [rank, in], b [out, rank]."""

    module: Module
    rank: int
    scale: float
    a: Factor
    b: Factor

    @property
    def elements(self) -> int:
        """Numbers in both factors."""
        return self.rank * (self.module.in_features + self.module.out_features)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was opened: ``file`` of ``size`` bytes holds the factors of ``parts``, in the model's order."""

    name: str
    file: Path
    size: int
    parts: tuple[AdapterPart, ...]

    @property
    def elements(self) -> int:
        """Numbers in all factors."""
        return sum(part.elements for part in self.parts)
