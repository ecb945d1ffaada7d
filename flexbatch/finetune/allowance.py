"""What of its time inference may lose to training, and what it has lost. Knows seconds, not what they were for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_PATIENCE = 4  # sweeps over which what may be lost is spent
_WEIGHT = 0.25  # of the newest sweep in a mean
_FAR = 2  # times the idle time of a sweep: if the mean has more, the sweep is not ridden
_WORTH = 0.25  # of training's seconds: less idle time in the mean is not worth waiting for


@dataclass(slots=True)
class _Usual:
    """Sweeps of about one size without training: ``seconds`` (None: none went without), ``idle`` ones of products.

    ``others``: seconds of the busiest other resource, in sweeps with training, too.
    """

    seconds: float | None = None
    others: float | None = None
    idle: float | None = None


@dataclass(slots=True)
class Allowance:
    """``share`` of the time may be lost. ``inference_s``: seconds of sweeps as they would be without training.

    ``overlap``: whether training can use the time that products wait. Sweeps are told apart by their ``tokens``, up to
    a factor of two. The first thing that training does is always allowed: what it costs is not known before.
    """

    share: float
    overlap: bool = True
    inference_s: float = 0.0
    lost_s: float = 0.0
    _began: bool = False
    _rode: bool = False  # in the newest sweep
    _newest_s: float = 0.0
    _idle_s: float | None = None  # of sweeps of any size
    _usual: dict[int, _Usual] = field(default_factory=dict)

    @property
    def suffices(self) -> bool:
        """Whether as much may be lost once more as the last time."""
        return not self._began or self._newest_s <= self._left_s

    def idle_s(self, tokens: int) -> float:
        """How long products wait in a sweep of so many tokens without training, of late; 0 if none is known."""
        return self._of(tokens).idle or 0.0

    def budget_s(self, tokens: int) -> float:
        """Seconds of training that a sweep may hold: products' idle time, and a part of what may be lost."""
        return self.idle_s(tokens) + max(0.0, self._left_s) / _PATIENCE

    def allows(self, tokens: int, learning: float) -> bool:
        """Whether a sweep may hold so many seconds of training.

        Not if others have far more idle time, in which much of it would hide.
        """
        idle = self.idle_s(tokens)
        if not self._began:
            return True
        if (self._idle_s or 0.0) > max(_FAR * idle, _WORTH * learning):
            return False
        return 0 <= max(0.0, learning - idle) <= self._left_s

    def swept(self, tokens: int, seconds: float, products: float, others: Mapping[str, float]) -> None:
        """Count a sweep without training: its seconds, those of products, and those of other resources.

        After one with training it may have found its first weights there already, and be shorter than is usual.
        """
        usual = self._of(tokens)
        if self._rode:
            self._count(usual, seconds, products, others)
        else:
            usual.seconds = _mean(usual.seconds, seconds)
            usual.others = _mean(usual.others, max(others.values(), default=0.0))
            self.inference_s += seconds
            self._idle(usual, seconds - products)
        self._rode = False

    def shared(
        self, tokens: int, seconds: float, learning: float, products: float, others: Mapping[str, float]
    ) -> None:
        """Count a sweep with ``products`` seconds of products, of which ``learning`` are those of training."""
        usual = self._of(tokens)
        before = self.lost_s
        self._count(usual, seconds, products - learning, others, least=seconds - learning)
        self._began = self._rode = True
        self._newest_s = self.lost_s - before

    def _count(
        self, usual: _Usual, seconds: float, products: float, others: Mapping[str, float], *, least: float = 0.0
    ) -> None:
        """Count a sweep that training changed: ``products`` are inference's own, without training it took ``least``.

        It would have taken as long as the busiest of the ``others``, inference's resources but that of the products,
        does in the mean: what was fetched ahead in one sweep makes the next one shorter, so that there is something to
        gain, too. Not longer than is usual, for training may have slowed them down; and as long as its products.
        """
        usual.others = _mean(usual.others, max(others.values(), default=0.0))
        busiest = usual.others if usual.seconds is None else min(usual.others, usual.seconds)
        alone = max(least, busiest, products)
        self.lost_s += seconds - alone
        self.inference_s += alone
        self._idle(usual, alone - products)

    def stopped(self, seconds: float) -> None:
        """Count a pause of inference."""
        self._began = True
        self._newest_s = seconds
        self.lost_s += seconds

    @property
    def _left_s(self) -> float:
        return self.share / (1 - self.share) * self.inference_s - self.lost_s

    def _of(self, tokens: int) -> _Usual:
        return self._usual.setdefault(tokens.bit_length(), _Usual())

    def _idle(self, usual: _Usual, seconds: float) -> None:
        newest = max(0.0, seconds) if self.overlap else 0.0
        usual.idle, self._idle_s = _mean(usual.idle, newest), _mean(self._idle_s, newest)


def _mean(known: float | None, newest: float) -> float:
    return newest if known is None else known + _WEIGHT * (newest - known)
