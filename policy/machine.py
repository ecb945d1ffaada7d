"""What a plan may use of a machine. Plain numbers; who measured them is not its concern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

LANES = 2
"""Micro-batches whose KV pages or hidden states are on their way at a time."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan may use: the tier of the products and their type, and bytes of every tier.

    ``reserved``: bytes of tiers that were there, and are kept for something else of the run.
    """

    compute: str
    gpu: int
    cpu: int
    disk: int
    dtype: str
    reserved: Mapping[str, int] = field(default_factory=dict)

    def budget(self, tier: str) -> int:
        """Bytes of ``tier``."""
        return {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk}[tier]

    def with_budget(self, tier: str, nbytes: int) -> Machine:
        """The same with ``nbytes`` on ``tier``."""
        budgets = {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk, tier: nbytes}
        return replace(self, gpu=budgets["gpu"], cpu=budgets["cpu"], disk=budgets["disk"])

    def without(self, tier: str, nbytes: int) -> Machine:
        """The same with ``nbytes`` of ``tier`` reserved; a budget below zero says how much that is too much."""
        less = self.with_budget(tier, self.budget(tier) - nbytes)
        return replace(less, reserved={**self.reserved, tier: self.reserved.get(tier, 0) + nbytes})

    def whole(self, tier: str) -> int:
        """Bytes of ``tier``, those that are reserved included."""
        return self.budget(tier) + self.reserved.get(tier, 0)
