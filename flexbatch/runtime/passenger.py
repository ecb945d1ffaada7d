"""What may travel with inference's sweeps: work on the same weights while they are there, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from flexbatch.models.spec import Family
from flexbatch.policy.machine import Machine
from flexbatch.policy.plan import Plan
from flexbatch.policy.profile import HardwareProfile
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
    plan: Plan
    profile: HardwareProfile


class Passenger(Protocol):
    """Work that travels with sweeps, or between them. Everything is called by the thread that runs them."""

    def reserve(self, machine: Machine) -> Machine:
        """What is left of a machine for inference."""

    def join(self, loaded: Loaded) -> None:
        """The model is there."""

    def handlers(self) -> Mapping[str, Callable[[Step], None]]:
        """What its Steps do."""

    def wants_pause(self) -> bool:
        """Whether nothing may be fetched under the end of the sweep that comes next, for ``board`` after it works."""

    def board(self, tokens: int) -> Ride | None:
        """What it does during the sweep that comes next, which has so many tokens of inference; None: nothing.

        What it does between sweeps, it does here.
        """

    def arrive(self, seconds: float, busy: Mapping[str, float]) -> None:
        """The sweep is done; it took so long, and resources were busy for so long meanwhile."""

    def leave(self, error: BaseException | None) -> None:
        """There are no more sweeps for now, or they have failed."""
