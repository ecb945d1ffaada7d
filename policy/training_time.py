"""How long finetuning takes: its Steps, as they are lowered for the executor, run on the simulator. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from flexbatch.options import Resource
from flexbatch.policy.cost import Cost, Load, Precision, Traffic, pairs_of, traffic
from flexbatch.policy.footprint import ModelSize, UnitSize
from flexbatch.policy.profile import HardwareProfile
from flexbatch.policy.simulator import Simulator, SweepTiming
from flexbatch.policy.training import TrainingPlan
from flexbatch.scheduler.lowering import Routes
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.training import LearningBatch, Visit
from flexbatch.scheduler.training_lowering import TrainingLowerer

_PAGE = 16  # nothing of finetuning lies in pages


def learning_cost(
    size: ModelSize,
    profile: HardwareProfile,
    *,
    compute: Resource,
    dtype: str,
    held: str,
    packed: bool,
    logit_rows: int,
) -> Cost:
    """What the Steps of finetuning cost; ``held``: the type of weights in RAM, ``packed``: layers rest in 4 bits."""
    stored = size.shape.stored_dtype
    precision = Precision(dtype, "int4" if packed else stored, stored, held)
    return Cost(size, precision, profile, compute=compute, page_tokens=_PAGE, logit_rows=logit_rows)


def load_of_batch(batch: LearningBatch, windows: Sequence[int | None]) -> Load:
    """What a micro-batch of examples asks of one layer (mean over the layers)."""
    pairs = sum(pairs_of(0, count, window) for count in batch.counts for window in windows) / len(windows)
    return Load(tokens=batch.tokens, pairs=pairs, readouts=batch.tokens)


def batch_seconds(cost: Cost, load: Load, weights: Traffic, lowest: int) -> float:
    """Seconds of products of one micro-batch, forward and back down to group ``lowest``."""
    layers, compute = cost.size.shape.num_layers, cost.compute
    ahead = sum(cost.seconds("learn_forward", compute, group, load, weights) for group in range(1, layers + 1))
    back = sum(
        cost.seconds("learn_backward", compute, group, load, weights) for group in range(max(1, lowest), layers + 1)
    )
    return ahead + cost.seconds("learn_loss", compute, layers + 1, load, weights) + back


def pass_timing(
    size: ModelSize,
    units: Sequence[UnitSize],
    plan: TrainingPlan,
    visits: Sequence[Visit],
    batches: Sequence[LearningBatch],
    profile: HardwareProfile,
    compute: Resource,
) -> SweepTiming:
    """One pass of finetuning under ``plan``, simulated Step by Step; the one before has fetched its first weights."""
    rows = max(16, min(1024, plan.loss_bytes // (4 * size.shape.vocab_size)))
    packed = any(unit.packed for unit in units)
    cost = learning_cost(
        size, profile, compute=compute, dtype=plan.dtype, held=plan.weights_dtype, packed=packed, logit_rows=rows
    )
    weights = traffic(units, plan.tiers, cost.precision, compute, size.shape.num_layers + 1)
    routes = Routes(
        num_layers=size.shape.num_layers,
        compute=compute,
        reads={group: int(nbytes) for group, nbytes in sorted(weights.read.items()) if nbytes},
        uploads={group: int(nbytes) for group, nbytes in sorted(weights.uploaded.items()) if nbytes},
        host_ring=plan.host_ring,
        gpu_ring=plan.gpu_ring,
        gather=None if weights.gather is None else "cpu",
    )
    loads = [load_of_batch(batch, size.shape.windows) for batch in batches]

    def seconds(step: Step) -> float:
        load = loads[step.batch] if step.batch >= 0 else Load()
        return cost.seconds(step.kind, step.resource, step.group, load, weights)

    lowerer, simulator = TrainingLowerer(routes, plan.kept), Simulator(overlap=plan.overlap, keep=False)
    simulator.run(lowerer.lower(visits, batches), seconds, 0)
    return simulator.run(lowerer.lower(visits, batches), seconds, 1)
