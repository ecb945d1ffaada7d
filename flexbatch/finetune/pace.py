"""How long tasks of training take a token, as measured, and how many micro-batches a riding sweep takes on by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flexbatch.scheduler.training import Riding, TaskKind

_BACK = 2.0  # times a layer forward, until one was measured: it is computed again, and its gradient


@dataclass(slots=True)
class Pace:
    """Seconds and tokens of the tasks done so far, by kind; metered ones count only while there are no others."""

    _usual: dict[TaskKind, tuple[float, int]] = field(default_factory=dict)
    _metered: dict[TaskKind, tuple[float, int]] = field(default_factory=dict)

    def took(self, kind: TaskKind, tokens: int, seconds: float, *, metered: bool) -> None:
        """Count one task."""
        into = self._metered if metered else self._usual
        known, count = into.get(kind, (0.0, 0))
        into[kind] = known + seconds, count + tokens

    @property
    def is_known(self) -> bool:
        """Whether anything was measured yet."""
        return bool(self._usual or self._metered)

    def of(self, kind: TaskKind) -> float:
        """Seconds a token."""
        seconds, tokens = self._usual.get(kind) or self._metered.get(kind) or (0.0, 0)
        if tokens:
            return seconds / tokens
        return _BACK * self.of("learn_forward") if kind == "learn_backward" else 0.0

    def entering(self, riding: Riding, tokens: Sequence[int], layers: int, budget_s: float) -> tuple[int, float]:
        """How many micro-batches the next sweep takes in, and the seconds that it then computes for training.

        As many as stay within ``budget_s``, in this sweep and in the next one, when all of them are on their way back;
        one if there is nothing else to do, or nothing was measured yet.
        """
        ahead = layers * self.of("learn_forward") + self.of("learn_loss")
        back = self.of("learn_backward")
        now = later = back * sum(tokens[batch] for batch in riding.returning)
        count = 0
        for batch in riding.waiting if self.is_known else ():
            if max(now + ahead * tokens[batch], later + back * tokens[batch]) > budget_s:
                break
            now, later = now + ahead * tokens[batch], later + back * tokens[batch]
            count += 1
        if count == 0 and not riding.returning and riding.waiting:
            return 1, ahead * tokens[riding.waiting[0]]
        return count, now
