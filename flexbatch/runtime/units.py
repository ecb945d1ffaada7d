"""What is placed as a whole: a model's linears, large ones in pieces, and its tables, with their sizes.

Knows entries of a checkpoint; not where anything rests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexbatch.checkpoint.tensors import Checkpoint, TensorEntry
from flexbatch.models.spec import WeightTable
from flexbatch.policy.footprint import UnitSize

_PIECES = 8  # no unit of a layer holds more than this part of it, so that all layers ask about as much of the disk
_LEAST_PIECE = 4 << 20  # bytes: products of less are slow
_ROWS = 64  # of a piece, a multiple: what products take at a time


@dataclass(frozen=True, slots=True)
class Unit:
    """What is placed as a whole: one linear (all its parts), rows of a large one, or a token-embedding table.

    ``key`` names it; a head tied to the embedding has the same key as the table. Units of one linear follow each other
    in the order of its outputs.
    """

    key: str
    group: int
    name: str
    entries: tuple[TensorEntry, ...]
    transposed: bool
    is_table: bool

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def elements(self) -> int:
        """Weights."""
        return sum(entry.elements for entry in self.entries)

    @property
    def packed(self) -> tuple[int, int]:
        """Of its weights those that are in 4 bits, and their bytes."""
        packed = [entry for entry in self.entries if entry.layout is not None]
        return sum(entry.elements for entry in packed), sum(entry.nbytes for entry in packed)


def units_of(table: WeightTable, checkpoint: Checkpoint, vocab_size: int, *, whole: bool = False) -> list[Unit]:
    """Every unit, in the order a sweep needs it; a tied table stands under both of its groups with one key.

    ``whole``: linears are not cut to pieces (backward's sums go over a linear's outputs, and would be rounded
    otherwise).
    """
    units: list[Unit] = []
    for index, group in enumerate(table.groups):
        limit = math.inf
        if not whole and index not in (0, len(table.groups) - 1):
            stored = (checkpoint.entries[f"{group.prefix}{p.module}.weight"] for li in group.linears for p in li.parts)
            limit = max(_LEAST_PIECE, sum(entry.nbytes for entry in stored) // _PIECES)
        for vector in group.vectors:
            if len(vector.shape) == 2 and vector.shape[0] == vocab_size:
                entry = checkpoint.entries[group.prefix + vector.tensor]
                units.append(Unit(entry.name, index, vector.name, (entry,), False, True))
        for linear in group.linears:
            entries = tuple(checkpoint.entries[f"{group.prefix}{part.module}.weight"] for part in linear.parts)
            pieces = {entries[0].name: entries}
            in_rows = not linear.transposed and all(map(checkpoint.divisible, entries))
            if in_rows and sum(entry.nbytes for entry in entries) > limit:
                pieces = {key: (piece,) for entry in entries for key, piece in _pieces(entry, limit)}
            units += [Unit(key, index, linear.name, held, linear.transposed, False) for key, held in pieces.items()]
    return units


def _pieces(entry: TensorEntry, limit: float) -> Iterator[tuple[str, TensorEntry]]:
    """A matrix in pieces of about ``limit`` bytes at most, and their keys."""
    rows = entry.shape[0]
    step = -(-rows // (math.ceil(entry.nbytes / limit) * _ROWS)) * _ROWS
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield f"{entry.name}[{start}:{stop}]", entry.piece(start, stop)


def unit_sizes(units: Sequence[Unit]) -> list[UnitSize]:
    """The sizes of ``units`` for a plan, each key once; ``edge`` marks those outside of the layers."""
    last = max(unit.group for unit in units)
    seen: dict[str, UnitSize] = {}
    for unit in units:
        before = seen.get(unit.key)
        groups = (unit.group,) if before is None else (*before.groups, unit.group)
        table = unit.is_table or (before is not None and before.table)
        edge = unit.group in (0, last)
        seen[unit.key] = UnitSize(
            unit.key, groups, unit.nbytes, unit.elements, edge, table, *unit.packed, parts=len(unit.entries)
        )
    return list(seen.values())
