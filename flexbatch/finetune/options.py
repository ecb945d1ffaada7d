"""What a user may fix about how an adapter is trained; checked where it is made. Knows no data and no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexbatch.errors import UsageError

ALL_LINEAR = "all-linear"
SHARE = 0.1
"""The part of its time that generation may lose to finetuning beside it, unless asked for otherwise."""
OptimizerName = Literal["adamw", "sgd"]
LrSchedule = Literal["cosine", "constant"]
StatesPlace = Literal["memory", "disk"]


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """Settings of one adapter's training. Defaults are those of the command line.

    ``target_modules``: ``all-linear``, or the names of modules. ``epochs`` None: one, or as many as ``max_steps``
    takes; with both, what is reached first ends the training. An optimizer step is over ``batch_size`` *
    ``grad_accumulation`` rows, ``batch_size`` of them at a time in memory. ``max_length`` cuts rows (None: too long
    ones are refused). ``window``: tokens of one step of the backward pass (None: chosen). ``clip`` 0 is off.
    ``init_from``: an adapter to go on from; rank, alpha and target modules are then its own. ``optimizer_states``:
    where AdamW's moments rest. Raises UsageError on a value out of range.
    """

    rank: int = 16
    alpha: float = 32
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    learning_rate: float = 2e-4
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 8
    grad_accumulation: int = 1
    max_length: int | None = None
    window: int | None = None
    optimizer: OptimizerName = "adamw"
    lr_schedule: LrSchedule = "cosine"
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    base_bits: Literal[16, 4] = 16
    init_from: Path | None = None
    save_every: int = 50
    optimizer_states: StatesPlace = "memory"

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "grad_accumulation", "save_every"):
            _whole(name, getattr(self, name), 1)
        for name in ("epochs", "max_steps", "window"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        if self.max_length is not None:
            _whole("max_length", self.max_length, 2)
        _whole("warmup_steps", self.warmup_steps, 0)
        _whole("seed", self.seed, 0, 2**63)
        for name in ("learning_rate", "weight_decay", "clip"):
            _number(name, getattr(self, name), 0, 1e9)
        _number("alpha", self.alpha, -1e9, 1e9)
        _number("dropout", self.dropout, 0, 1)
        if self.dropout == 1:
            raise UsageError("dropout must be from 0 to below 1, not 1")
        for name, known in (
            ("optimizer", ("adamw", "sgd")),
            ("lr_schedule", ("cosine", "constant")),
            ("base_bits", (16, 4)),
            ("optimizer_states", ("memory", "disk")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} must be {' or '.join(map(str, known))}, not {getattr(self, name)!r}")
        if self.target_modules != ALL_LINEAR:
            names = (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)
            if not names or not all(isinstance(name, str) and name for name in names):
                raise UsageError(f"target_modules must be {ALL_LINEAR} or names of modules, not {names!r}")
            object.__setattr__(self, "target_modules", names)

    def result_settings(self) -> dict[str, Any]:
        """Return what the trained adapter depends on, as JSON can say it; where and how often things rest is not."""
        return {
            "rank": self.rank,
            "alpha": float(self.alpha),
            "target_modules": self.target_modules if isinstance(self.target_modules, str) else [*self.target_modules],
            "learning_rate": float(self.learning_rate),
            "epochs": self.epochs,
            "max_steps": self.max_steps,
            "batch_size": self.batch_size,
            "grad_accumulation": self.grad_accumulation,
            "max_length": self.max_length,
            "window": self.window,
            "optimizer": self.optimizer,
            "lr_schedule": self.lr_schedule,
            "weight_decay": float(self.weight_decay),
            "warmup_steps": self.warmup_steps,
            "clip": float(self.clip),
            "dropout": float(self.dropout),
            "seed": self.seed,
            "base_bits": self.base_bits,
        }


def _whole(name: str, value: object, low: int, high: int = 2**31) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} on, not {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, not {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{name} must be from {low:g} to {high:g}, not {value!r}")
