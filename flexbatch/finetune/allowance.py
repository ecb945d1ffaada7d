"""What of its time inference may lose to training, and what it has lost. Knows seconds, not what they were for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Allowance:
    """``share`` of the time may be lost. ``inference_s``: seconds of sweeps as they would be without training.

    The first thing that training does is always allowed: what it costs is not known before.
    """

    share: float
    inference_s: float = 0.0
    lost_s: float = 0.0
    _newest_s: float = 0.0

    @property
    def suffices(self) -> bool:
        """Whether as much may be lost once more as the last time."""
        allowed = self.share / (1 - self.share) * self.inference_s
        return self.lost_s == 0 or self.lost_s + self._newest_s <= allowed

    def swept(self, seconds: float) -> None:
        """Count a sweep without training."""
        self.inference_s += seconds

    def shared(self, seconds: float, learning: float, others: Mapping[str, float]) -> None:
        """Count a sweep with ``learning`` seconds of products of training.

        Without them it would have taken as long as the busiest of the ``others``, inference's resources but that of the
        products, and at least the rest of the time.
        """
        alone = max(seconds - learning, min(seconds, max(others.values(), default=0.0)))
        self._newest_s = seconds - alone
        self.lost_s += self._newest_s
        self.inference_s += alone

    def stopped(self, seconds: float) -> None:
        """Count a pause of inference."""
        self._newest_s = seconds
        self.lost_s += seconds
