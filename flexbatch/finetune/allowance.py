"""What of its time inference may lose to training, and what it has lost. Knows seconds, not what they were for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_PATIENCE = 4  # sweeps over which what may be lost is spent
_WEIGHT = 0.25  # of the newest sweep in the mean idle time


@dataclass(slots=True)
class Allowance:
    """``share`` of the time may be lost. ``inference_s``: seconds of sweeps as they would be without training.

    ``idle_s``: how long products wait in a sweep without training, of late. ``overlap``: whether training can use it.

    The first thing that training does is always allowed: what it costs is not known before.
    """

    share: float
    inference_s: float = 0.0
    lost_s: float = 0.0
    idle_s: float = 0.0
    overlap: bool = True
    _newest_s: float = 0.0

    @property
    def suffices(self) -> bool:
        """Whether as much may be lost once more as the last time."""
        return self.lost_s == 0 or self._newest_s <= self._left_s

    @property
    def budget_s(self) -> float:
        """Seconds of training that a riding sweep may hold: products' idle time, and a part of what may be lost."""
        return self.idle_s + max(0.0, self._left_s) / _PATIENCE

    def allows(self, learning: float) -> bool:
        """Whether a sweep may hold so many seconds of training."""
        return self.lost_s == 0 or 0 <= max(0.0, learning - self.idle_s) <= self._left_s

    def swept(self, seconds: float, products: float) -> None:
        """Count a sweep without training, of so many seconds of products."""
        self.inference_s += seconds
        self._idle(seconds - products)

    def shared(self, seconds: float, learning: float, products: float, others: Mapping[str, float]) -> None:
        """Count a sweep with ``products`` seconds of products, of which ``learning`` are those of training.

        Without them it would have taken as long as the busiest of the ``others``, inference's resources but that of the
        products, and at least the rest of the time.
        """
        alone = max(seconds - learning, min(seconds, max(others.values(), default=0.0)))
        self._newest_s = seconds - alone
        self.lost_s += self._newest_s
        self.inference_s += alone
        self._idle(alone - (products - learning))

    def stopped(self, seconds: float) -> None:
        """Count a pause of inference."""
        self._newest_s = seconds
        self.lost_s += seconds

    @property
    def _left_s(self) -> float:
        return self.share / (1 - self.share) * self.inference_s - self.lost_s

    def _idle(self, seconds: float) -> None:
        if self.overlap:
            self.idle_s += _WEIGHT * (max(0.0, seconds) - self.idle_s)
