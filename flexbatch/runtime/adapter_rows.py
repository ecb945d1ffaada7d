"""Which rows of a micro-batch name which adapter. Knows no factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexbatch.kernels.lora import RowGroups, group_rows
from flexbatch.scheduler.sweep import MicroBatch


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The adapters ``names`` of a micro-batch and its rows.

    ``spans``: (first row, rows, place among the names), one for all rows of an adapter that lie together.
    """

    names: tuple[str, ...]
    spans: tuple[tuple[int, int, int], ...]
    groups: RowGroups

    @classmethod
    def of(cls, batch: MicroBatch) -> AdapterRows | None:
        """The adapters of a micro-batch's rows; None if all are of the base model."""
        places: dict[str, int] = {}
        spans: list[tuple[int, int, int]] = []
        row = 0
        for piece in batch.slices:
            name = piece.sequence.adapter
            if name is not None:
                place = places.setdefault(name, len(places))
                first, count, owner = spans[-1] if spans else (0, 0, -1)
                if owner == place and first + count == row:
                    spans[-1] = (first, count + piece.count, place)
                else:
                    spans.append((row, piece.count, place))
            row += piece.count
        return cls(tuple(places), tuple(spans), group_rows(spans)) if spans else None

    def select(self, rows: Sequence[int]) -> AdapterRows | None:
        """The same for a choice of the rows, in that order."""
        owner = {row: place for first, count, place in self.spans for row in range(first, first + count)}
        spans = tuple((new, 1, owner[row]) for new, row in enumerate(rows) if row in owner)
        return AdapterRows(self.names, spans, group_rows(spans)) if spans else None
