"""How finetuning shares a process with inference: in which order backward goes, and how much of it a sweep takes in.

Riding moves no weights, but its pipe has to fill, and saved inputs of all micro-batches under way have to rest
somewhere. A reverse pass between two sweeps stops inference for as long as it takes, and streams the weights twice.
Pure: a plan of inference and a profile in, figures and a choice with its reason out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flexbatch.policy.cost import Cost, Load, Traffic, pairs_of
from flexbatch.policy.footprint import ModelSize
from flexbatch.policy.machine import Machine
from flexbatch.policy.plan import Plan
from flexbatch.policy.profile import HardwareProfile
from flexbatch.policy.training import LOSS_BYTES, TrainingJob, riding_bytes
from flexbatch.policy.training_time import batch_seconds, learning_cost
from flexbatch.scheduler.lowering import Routes
from flexbatch.scheduler.training import Order
from flexbatch.units import format_size

_MOST_INPUTS = 0.1  # of a tier's budget that saved inputs may take before they go a tier lower
_BELOW = {"gpu": "cpu", "cpu": "disk"}


@dataclass(frozen=True, slots=True)
class CoservingPlan:
    """How a finetuning job shares sweeps: ``order`` of backward and why, and what is predicted of it.

    ``together``: micro-batches that a riding sweep is thought to take in, which is decided anew before each (reverse:
    that one pass between two sweeps takes).
    ``kept``: the tier of saved inputs. ``share``: what of the time inference may lose. Tokens per second are those
    while inference runs: of the order that was chosen, and of ``other`` one.
    """

    order: Order
    reason: str
    together: int
    tokens_per_sweep: int
    window: int
    kept: str
    share: float
    predicted: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Setting:
    """What both orders are counted with: seconds of inference's sweep, of its products, and of one micro-batch.

    ``batches`` of ``rows`` tokens make a step, over ``layers`` trained ones. ``stream_s``: one pass over the weights
    that stream; ``inputs_s``: one micro-batch's inputs on their way to their tier and back.
    """

    sweep_s: float
    product_s: float
    batch_s: float
    stream_s: float
    inputs_s: float
    batches: int
    rows: float
    layers: int
    share: float

    @property
    def limit_s(self) -> float:
        """What a sweep may take."""
        return self.sweep_s / (1 - self.share)


def inputs_tier(size: ModelSize, job: TrainingJob, machine: Machine) -> str:
    """Where the inputs of layers wait for their backward: the tier of the products, if they take little of it."""
    tier = machine.compute
    while tier in _BELOW and input_bytes(size, job, machine.dtype) > _MOST_INPUTS * machine.budget(tier):
        tier = _BELOW[tier]
    return tier


def input_bytes(size: ModelSize, job: TrainingJob, dtype: str) -> int:
    """Saved inputs of a whole step: those of every trained layer for every token."""
    return (size.shape.num_layers + 1 - max(1, job.lowest)) * job.tokens * size.hidden_token_bytes(dtype)


def reserved(size: ModelSize, job: TrainingJob, machine: Machine, kept: str) -> Machine:
    """What finetuning leaves of a machine to inference."""
    below = kept != machine.compute
    taken = riding_bytes(size, job, machine.dtype, below=below)
    left = machine.without(machine.compute, taken)
    if below:
        left = left.without(kept, input_bytes(size, job, machine.dtype))
    return left


def plan_coserving(
    size: ModelSize,
    job: TrainingJob,
    plan: Plan,
    routes: Routes,
    profile: HardwareProfile,
    *,
    kept: str,
    share: float,
    batches: int,
    order: Order | None = None,
) -> CoservingPlan:
    """Choose the order with more tokens per second, the simpler one if both are equal.

    ``batches``: micro-batches of a step. ``order``: asked for, whatever comes of it.
    """
    setting = _setting(size, job, plan, routes, profile, kept, share, batches)
    together = most_together(setting)
    riding, reverse = _riding_rate(setting, together), _reverse_rate(setting)
    chosen: Order = order or ("riding" if riding > reverse else "reverse")
    streamed = sum(routes.uploads.values()) if routes.compute == "gpu" else sum(routes.reads.values())
    idle = max(0.0, 1 - setting.product_s / setting.sweep_s)
    why = "asked for" if order is not None else "more tokens/s"
    moved = f"streams {format_size(2 * streamed)} of weights" if streamed else "moves no weights either"
    reason = (
        f"{why}: riding {riding:.1f}, reverse {reverse:.1f} tokens/s; products wait {100 * idle:.0f}% of a sweep, "
        f"a reverse pass {moved}"
    )
    slots = together if chosen == "riding" else _most_at_once(setting)
    return CoservingPlan(
        order=chosen,
        reason=reason,
        together=slots,
        tokens_per_sweep=round(slots * setting.rows),
        window=job.window,
        kept=kept if chosen == "riding" or streamed else routes.compute,
        share=share,
        predicted={
            "tokens_per_s": riding if chosen == "riding" else reverse,
            "riding_tokens_per_s": riding,
            "reverse_tokens_per_s": reverse,
            "sweep_s": _riding_sweep_s(setting, together) if chosen == "riding" else setting.sweep_s,
            "alone_sweep_s": setting.sweep_s,
        },
    )


def most_together(setting: _Setting) -> int:
    """How many micro-batches a sweep takes in: as many as make the step shortest within what inference may lose."""
    possible = range(1, setting.batches + 1)
    within = [1, *(count for count in possible if _riding_sweep_s(setting, count) <= setting.limit_s)]
    return max(within, key=lambda count: (_riding_rate(setting, count), -count))


def _most_at_once(setting: _Setting) -> int:
    """How many micro-batches a pass between sweeps takes: no more than keep products busy while weights stream."""
    return max(1, min(setting.batches, math.ceil(2 * setting.stream_s / setting.batch_s)))


def _setting(
    size: ModelSize,
    job: TrainingJob,
    plan: Plan,
    routes: Routes,
    profile: HardwareProfile,
    kept: str,
    share: float,
    batches: int,
) -> _Setting:
    compute, dtype = routes.compute, plan.dtype
    rows = job.tokens / batches
    busy = plan.predicted.get("resource_s", {})
    layers = size.shape.num_layers + 1 - max(1, job.lowest)
    row_bytes = rows * layers * size.hidden_token_bytes(dtype)
    ways = {"cpu": ("d2h", "h2d"), "disk": ("disk_write", "disk_read")}
    links: Sequence[str] = () if kept == compute else ways[kept]
    sweep_s = max(plan.predicted.get("sweep_s", 0.0), *busy.values(), 1e-9)
    cost = learning_cost(
        size,
        profile,
        compute=compute,
        dtype=dtype,
        held=plan.weights_dtype,
        packed=plan.weight_bits == 4,
        logit_rows=max(16, min(1024, LOSS_BYTES // (4 * size.shape.vocab_size))),
    )
    length = min(rows, job.longest)
    pairs = rows / length * sum(pairs_of(0, length, window) for window in size.shape.windows) / size.shape.num_layers
    load = Load(tokens=rows, pairs=pairs, readouts=rows)
    return _Setting(
        sweep_s=sweep_s,
        product_s=min(sweep_s, busy.get(compute, sweep_s)),
        batch_s=batch_seconds(cost, load, _traffic(size, routes, cost, plan), job.lowest),
        stream_s=max(
            sum(routes.reads.values()) / profile.links["disk_read"] if routes.reads else 0.0,
            sum(routes.uploads.values()) / profile.links["h2d"] if routes.uploads else 0.0,
        ),
        inputs_s=sum(row_bytes / profile.links[link] for link in links),
        batches=batches,
        rows=rows,
        layers=layers,
        share=share,
    )


def _traffic(size: ModelSize, routes: Routes, cost: Cost, plan: Plan) -> Traffic:
    """Which weights have to be widened before a product: those that stream, and all where they rest narrow."""
    stored, edges = cost.precision.stored, cost.precision.edges
    last = size.shape.num_layers + 1
    streamed = routes.uploads if routes.compute == "gpu" else routes.reads
    widened: dict[int, float] = {}
    for group in range(1, last + 1):
        own = size.groups[group].matrices + size.groups[group].shared
        narrow = stored if group < last else edges
        if narrow != plan.dtype and (group in streamed or plan.weights_dtype != plan.dtype or narrow == "int4"):
            widened[group] = own
    return Traffic(widened=widened)


def _riding_sweep_s(setting: _Setting, together: int) -> float:
    """A sweep that ``together`` micro-batches ride on: products wait for bytes, or bytes for products."""
    return max(
        setting.sweep_s,
        setting.product_s + together * setting.batch_s,
        setting.stream_s + together * setting.inputs_s,
    )


def _riding_rate(setting: _Setting, together: int) -> float:
    """Tokens per second: a step takes as many sweeps as it has groups of micro-batches, and one more for each layer.

    Where one micro-batch is more than a sweep may take on, only every so manyth sweep is ridden on.
    """
    sweeps = math.ceil(setting.batches / together) + setting.layers
    ridden_s = _riding_sweep_s(setting, together)
    lost, may_lose = ridden_s - setting.sweep_s, setting.limit_s - setting.sweep_s
    each = max(1.0, lost / may_lose) if may_lose > 0 else math.inf
    return setting.batches * setting.rows / (sweeps * (each * setting.sweep_s + lost))


def _reverse_rate(setting: _Setting) -> float:
    """Tokens per second: a pass over the whole step takes the part of the time that inference may lose."""
    step_s = max(setting.batches * setting.batch_s, 2 * setting.stream_s + setting.batches * setting.inputs_s)
    if setting.stream_s == 0:
        step_s = setting.batches * setting.batch_s
    return setting.share * setting.batches * setting.rows / step_s
