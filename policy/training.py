"""Where a finetuning run keeps what: weights, saved inputs, and what one window needs. Pure; counts bytes only.

A byte of weights and a byte of saved inputs that rest below the products both move twice an accumulation (weights down
the sweep and back, inputs out and back), but inputs are also written. So inputs come first, then weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexbatch.errors import DoesNotFitError
from flexbatch.options import EngineOptions
from flexbatch.policy.footprint import DTYPE_BYTES, ModelSize, UnitSize
from flexbatch.policy.machine import LANES, Machine
from flexbatch.policy.memory import resident_bytes
from flexbatch.policy.plan import TierMemory
from flexbatch.policy.search import check_options
from flexbatch.policy.weights import WeightPlacement, deal, grown_ring
from flexbatch.scheduler.spread import Spread
from flexbatch.units import MIB, Shares, format_size

WINDOW = 512
"""Tokens of a window unless asked for otherwise: enough rows for products, few enough for their inner states."""
LOSS_BYTES = 32 * MIB
"""Bytes of logits that exist at a time."""
_STATES = 4  # numbers of fp32 a trained one needs: itself, its gradient, two moments
_STEPS = 64  # tries from everything on a tier to nothing


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What is to be trained: ``tokens`` at most in a pass, windows, trained numbers, and the first trained group.

    ``longest``: tokens of the longest example.
    """

    tokens: int
    window: int
    longest: int
    elements: int
    lowest: int

    @property
    def window_rows(self) -> int:
        """Tokens that are computed together, at most."""
        return min(self.window, self.tokens)

    @property
    def batch_rows(self) -> int:
        """Tokens of a micro-batch, at most: an example, or as many as fill a window."""
        return max(self.longest, self.window_rows)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How a finetuning run is carried out; sizes in bytes.

    ``tiers``: unit key -> tier of its weights; ``kept``: layer group -> tier of its saved inputs.
    """

    weights: Shares
    tiers: Mapping[str, str]
    kept: Mapping[int, str]
    window: int
    loss_bytes: int
    dtype: str
    weights_dtype: str
    host_ring: int
    gpu_ring: int
    overlap: bool
    memory: Mapping[str, TierMemory]


def plan_training(
    size: ModelSize,
    units: Sequence[UnitSize],
    job: TrainingJob,
    options: EngineOptions,
    machine: Machine,
    *,
    stored_dtype: str,
) -> TrainingPlan:
    """Return the plan with the most on the tier of the products, inputs before weights.

    ``options.weights`` and ``options.hidden`` (for saved inputs) are constraints. Raises DoesNotFitError, naming the
    tier and what is missing, if even streamed weights and inputs on disk do not fit.
    """
    check_options(options, machine)
    compute = machine.compute
    held = [machine.dtype, stored_dtype] if compute == "cpu" else [stored_dtype]
    last: TrainingPlan | None = None
    for hidden in _hidden_choices(options, compute):
        for weights, weights_dtype in _weight_choices(options, compute, held):
            placement = deal(units, weights, compute=compute)
            last = _account(size, units, job, options, machine, hidden, placement, weights_dtype)
            left = {tier: memory.budget - memory.total for tier, memory in last.memory.items()}
            if min(left.values()) >= 0:
                placement = replace(
                    placement,
                    host_ring=grown_ring(placement.reads, left["cpu"]),
                    gpu_ring=grown_ring(placement.uploads, left.get("gpu", 0)),
                )
                return _account(size, units, job, options, machine, hidden, placement, weights_dtype)
    assert last is not None
    raise _misfit(last)


def _hidden_choices(options: EngineOptions, compute: str) -> list[Shares]:
    if options.hidden is not None:
        return [options.hidden]
    order = [Shares(0, 1, 0), Shares(0, 0.5, 0.5), Shares(0, 0, 1)]
    return order if compute == "cpu" else [Shares(1, 0, 0), Shares(0.5, 0.5, 0), *order]


def _weight_choices(options: EngineOptions, compute: str, held: Sequence[str]) -> list[tuple[Shares, str]]:
    """Placements of the weights, the most on the tier of the products first; on a CPU widened ones if all fit."""
    if options.weights is not None:
        return [(options.weights, dtype) for dtype in held]
    parts = [step / _STEPS for step in range(_STEPS, -1, -1)]
    if compute == "cpu":
        return [(Shares(0, 1, 0), dtype) for dtype in held] + [(Shares(0, part, 1 - part), held[-1]) for part in parts]
    choices = [Shares(part, 1 - part, 0) for part in parts]
    choices += [Shares(0, part, 1 - part) for part in parts]
    return [(shares, held[-1]) for shares in choices]


def _account(
    size: ModelSize,
    units: Sequence[UnitSize],
    job: TrainingJob,
    options: EngineOptions,
    machine: Machine,
    hidden: Shares,
    placement: WeightPlacement,
    weights_dtype: str,
) -> TrainingPlan:
    compute, dtype = machine.compute, machine.dtype
    spread = Spread(hidden)
    row = size.hidden_token_bytes(dtype)
    layers = range(max(1, job.lowest), size.shape.num_layers + 1)
    kept = {group: spread.choose(job.tokens * row) for group in layers}
    inputs = {tier: sum(job.tokens * row for own in kept.values() if own == tier) for tier in ("gpu", "cpu", "disk")}
    resident = {"gpu": 0, "cpu": 0, "disk": 0}
    for unit in units:
        tier = placement.tiers[unit.key]
        resident[tier] += resident_bytes(unit, tier, weights_dtype, compute)
    resident[compute] += size.small_bytes(dtype)
    resident["cpu"] += placement.host_ring
    working = {"gpu": 0, "cpu": 0, "disk": 0}
    working[compute] = working_bytes(size, job, dtype)
    if compute == "gpu":
        resident["gpu"] += placement.gpu_ring
        working["cpu"] += 2 * LANES * job.batch_rows * row if inputs["disk"] else 0
    if inputs["disk"] or (compute == "gpu" and inputs["cpu"]):
        working[compute] += 2 * LANES * job.batch_rows * row
    adapters = {"gpu": 0, "cpu": 0, "disk": 0, compute: job.elements * 4 * _STATES}
    memory = {
        tier: TierMemory(
            weights=resident[tier] if tier != "disk" else 0,
            hidden=inputs[tier],
            adapters=adapters[tier],
            working=working[tier],
            budget=machine.budget(tier),
        )
        for tier in ("gpu", "cpu", "disk")
        if tier != "gpu" or compute == "gpu"
    }
    return TrainingPlan(
        weights=placement.shares,
        tiers=placement.tiers,
        kept=kept,
        window=job.window,
        loss_bytes=LOSS_BYTES,
        dtype=dtype,
        weights_dtype=weights_dtype,
        host_ring=placement.host_ring,
        gpu_ring=placement.gpu_ring,
        overlap=options.overlap,
        memory=memory,
    )


def working_bytes(size: ModelSize, job: TrainingJob, dtype: str) -> int:
    """What a pass needs beside saved inputs.

    Two hidden states of all its tokens, one window's inner states and their gradients, keys and values of the longest
    micro-batch with theirs, a chunk of logits with its copy, and a tile of weights that are widened or unpacked (as if
    they were in 4 bits, which takes most).
    """
    shape, each = size.shape, DTYPE_BYTES[dtype]
    inner = 8 * shape.hidden_size + 3 * size.qkv_width + 9 * shape.intermediate_size
    kv_width = 2 * shape.num_kv_heads * shape.head_dim
    keys = job.batch_rows * kv_width * (each + 3 * 4)
    chunk = min(job.tokens, max(16, min(1024, LOSS_BYTES // (4 * shape.vocab_size))))
    logits = 2 * chunk * shape.vocab_size * 4
    states = 2 * job.tokens * size.hidden_token_bytes(dtype)
    rows = job.window_rows
    return states + max(rows * inner * each + keys, logits) + size.tile_bytes(rows, dtype, "int4")


def riding_bytes(size: ModelSize, job: TrainingJob, dtype: str, *, below: bool) -> int:
    """What riding takes of the tier of the products: as a pass does, with saved inputs there unless they are ``below``.

    Micro-batches are at all depths at once, so inputs are those of all layers for as many of them as are under way.
    """
    layers = size.shape.num_layers + 1 - max(1, job.lowest)
    inputs = 0 if below else layers * job.tokens * size.hidden_token_bytes(dtype)
    transfers = 2 * LANES * job.batch_rows * size.hidden_token_bytes(dtype) if below else 0
    return working_bytes(size, job, dtype) + inputs + transfers + job.elements * 4 * _STATES


def _misfit(plan: TrainingPlan) -> DoesNotFitError:
    tier, memory = max(plan.memory.items(), key=lambda item: item[1].total - item[1].budget)
    missing = memory.total - memory.budget
    remedy = f"--{tier}-memory, or a smaller --window or --max-length"
    return DoesNotFitError(
        f"finetuning does not fit: the {tier} tier needs {format_size(memory.total)} (weights "
        f"{format_size(memory.weights)}, saved inputs {format_size(memory.hidden)}, adapter "
        f"{format_size(memory.adapters)}, working memory {format_size(memory.working)}) and has "
        f"{format_size(memory.budget)}: raise {remedy}",
        tier=tier,
        missing=missing,
        remedy=remedy,
    )
