"""What a plan may use of a machine. Plain numbers; who measured them is not its concern."""

from __future__ import annotations

from dataclasses import dataclass, replace

LANES = 2
"""Micro-batches whose KV pages or hidden states are on their way at a time."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan may use: the tier of the products and their type, and bytes of every tier."""

    compute: str
    gpu: int
    cpu: int
    disk: int
    dtype: str

    def budget(self, tier: str) -> int:
        """Bytes of ``tier``."""
        return {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk}[tier]

    def with_budget(self, tier: str, nbytes: int) -> Machine:
        """The same with ``nbytes`` on ``tier``."""
        budgets = {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk, tier: nbytes}
        return replace(self, gpu=budgets["gpu"], cpu=budgets["cpu"], disk=budgets["disk"])
