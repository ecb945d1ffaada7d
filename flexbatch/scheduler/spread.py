"""Deals sized things out to tiers so that given shares hold at every moment, not only in the end. Pure."""

from __future__ import annotations

from flexbatch.units import Shares


class Spread:
    """Error diffusion: each thing goes to the tier that is furthest behind its share.

    After any prefix of things, every tier's part is within one thing of its share; so I/O is even along the way.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = {"gpu": shares.gpu, "cpu": shares.cpu, "disk": shares.disk}
        self._dealt = dict.fromkeys(self._shares, 0)
        self._total = 0

    def choose(self, size: int) -> str:
        """Return the tier for a thing of ``size`` (tokens, bytes)."""
        self._total += size
        tier = max(self._shares, key=lambda name: self._shares[name] * self._total - self._dealt[name])
        self._dealt[tier] += size
        return tier
