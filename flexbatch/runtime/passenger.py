"""What may travel with inference's sweeps: work on the same weights while they are there, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from flexbatch.models.spec import Family
from flexbatch.runtime.device import Device
from flexbatch.runtime.weight_store import WeightStore
from flexbatch.scheduler.lowering import Ride, Routes
from flexbatch.scheduler.steps import Step
from flexbatch.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is loaded: all that work on its weights needs."""

    shape: ModelShape
    family: Family
    weights: WeightStore
    device: Device
    dtype: torch.dtype
    routes: Routes


class Passenger(Protocol):
    """Work that rides on sweeps. All but ``working_bytes`` is called by the thread that runs them."""

    def working_bytes(self, dtype: str) -> int:
        """Bytes of the tier of the products that it takes."""

    def join(self, loaded: Loaded) -> None:
        """The model is there."""

    def handlers(self) -> Mapping[str, Callable[[Step], None]]:
        """What its Steps do."""

    def board(self) -> Ride | None:
        """What it does during the sweep that comes next; None: nothing."""

    def arrive(self, seconds: float) -> None:
        """The sweep is done; it took so long."""

    def leave(self, error: BaseException | None) -> None:
        """There are no more sweeps for now, or they have failed."""
