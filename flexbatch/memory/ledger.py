"""The ledger of one tier: how many bytes of its budget are taken, and how many were at most. Knows no tensors."""

from __future__ import annotations

import threading

from flexbatch.errors import DoesNotFitError, InternalError
from flexbatch.units import format_size


class Ledger:
    """Counts the bytes of ``tier`` to the byte against ``budget``; any thread may take and give.

    ``remedy`` is the option that raises the budget (``--gpu-memory`` for tier ``gpu``, unless given).
    """

    def __init__(self, tier: str, budget: int, remedy: str | None = None) -> None:
        if budget < 0:
            raise InternalError(f"a {tier} tier of {budget} bytes")
        self.tier = tier
        self.budget = budget
        self.used = 0
        self.peak = 0
        self._remedy = remedy or f"--{tier}-memory"
        # Reentrant: the garbage collector may free a buffer, and so give, in the midst of a take of the same thread.
        self._lock = threading.RLock()

    @property
    def left(self) -> int:
        """Bytes that nobody has taken."""
        return self.budget - self.used

    def take(self, nbytes: int, what: str) -> None:
        """Count ``nbytes`` for ``what``; raise DoesNotFitError, and count nothing, if fewer are left."""
        assert nbytes >= 0
        with self._lock:
            missing = self.used + nbytes - self.budget
            if missing <= 0:
                self.used += nbytes
                if self.used > self.peak:
                    self.peak = self.used
                return
        raise DoesNotFitError(
            f"{what}: {format_size(nbytes)}, but the {self.tier} tier has {format_size(nbytes - missing)} of its "
            f"{format_size(self.budget)} left: raise {self._remedy} by {missing} bytes",
            tier=self.tier,
            missing=missing,
            remedy=self._remedy,
        )

    def give(self, nbytes: int) -> None:
        """Give ``nbytes`` back; raise InternalError if so many were never taken."""
        assert nbytes >= 0
        with self._lock:
            excess = nbytes - self.used
            if excess <= 0:
                self.used -= nbytes
                return
        raise InternalError(f"the {self.tier} tier was given back {excess} bytes more than were taken")

    def check_idle(self, held: int = 0) -> None:
        """Raise InternalError unless exactly ``held`` bytes are taken, those that stay while nothing runs."""
        if self.used != held:
            raise InternalError(f"the {self.tier} tier holds {self.used} bytes when idle, {held} are accounted for")
