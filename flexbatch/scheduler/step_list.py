"""Steps as they are added one after the other, sweep after sweep, with ids that never repeat. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flexbatch.scheduler.steps import Kind, Resource, Step


@dataclass(frozen=True, slots=True)
class Lowered:
    """The Steps of a sweep, and the ids after which its results are there; the rest is prefetch for the next one."""

    steps: list[Step]
    until: frozenset[int]


class StepList:
    """The Steps of one sweep, and where the ids of the one before began."""

    def __init__(self) -> None:
        self._next_id = 0
        self._oldest = 0  # the first id of the sweep before: when a sweep begins, what is older is long done
        self._first = 0  # of this sweep
        self._steps: list[Step] = []
        self._until: set[int] = set()

    def begin(self) -> None:
        """Start the next sweep."""
        self._steps, self._until = [], set()
        self._oldest, self._first = self._first, self._next_id

    def add(
        self,
        kind: Kind,
        resource: Resource,
        group: int,
        batch: int,
        tokens: int,
        after: Iterable[int | None],
        *,
        slot: int = 0,
        prefetch: bool = False,
    ) -> int:
        """Append a Step and return its id."""
        wait = tuple(sorted({step for step in after if step is not None and step >= self._oldest}))
        step = Step(self._next_id, kind, resource, group, batch, tokens, wait, slot)
        self._next_id += 1
        self._steps.append(step)
        if not prefetch:
            self._until.add(step.id)
        return step.id

    def require(self, steps: Iterable[int]) -> None:
        """The sweep ends only after ``steps`` of the one before, too."""
        self._until.update(steps)

    def lowered(self) -> Lowered:
        """What has been added since the sweep began."""
        return Lowered(self._steps, frozenset(self._until))
