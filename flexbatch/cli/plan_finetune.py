"""The finetuning part of ``flexbatch plan --finetune``: what both jobs would do together, and training alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flexbatch.cli.cofinetune import CoFinetune
from flexbatch.errors import DoesNotFitError, UsageError
from flexbatch.finetune.examples import Example, ExampleEncoder
from flexbatch.finetune.parameters import chosen_modules
from flexbatch.finetune.schedule import Course
from flexbatch.finetune.work import counts_of
from flexbatch.jobs.training_rows import read_training_rows
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.options import EngineOptions
from flexbatch.policy.coserving import inputs_tier, plan_coserving, reserved
from flexbatch.policy.cost import traffic
from flexbatch.policy.footprint import UnitSize
from flexbatch.policy.machine import Machine
from flexbatch.policy.memory import sized
from flexbatch.policy.plan import Plan
from flexbatch.policy.training import WINDOW, TrainingJob, plan_training
from flexbatch.policy.training_time import learning_cost, pass_timing
from flexbatch.policy.verdict import routes_of
from flexbatch.policy.weights import WeightPlacement
from flexbatch.scheduler.training import cut_batches, reverse_order

if TYPE_CHECKING:
    from flexbatch.checkpoint.locate import ModelFolder
    from flexbatch.policy.candidates import Shop
    from flexbatch.text.codec import TextCodec


class FinetunePlanner:
    """One training's lengths and sizes; ``left`` is what it leaves of the machine to generation.

    Raises InputError for bad rows, UsageError for modules that the model has not.
    """

    def __init__(
        self,
        asked: CoFinetune,
        folder: ModelFolder,
        codec: TextCodec | None,
        options: EngineOptions,
        machine: Machine,
    ) -> None:
        self._asked, self._options, self._machine = asked, options, machine
        training, shape = asked.training, folder.shape
        examples = _examples(asked, folder, codec)
        course = Course.of(training, len(examples))
        steps = [course.batches(step) for step in range(min(course.steps, course.steps_per_epoch))]
        largest = max(steps, key=lambda step: sum(len(examples[row].tokens) for rows in step for row in rows))
        self._sizes = [len(rows) for rows in largest]
        self._counts = counts_of([examples[row] for rows in largest for row in rows])
        self._steps = course.steps
        chosen = chosen_modules(shape, training.rank, training.alpha, training.target_modules)
        window = training.window or WINDOW
        self._size = model_size(shape, family_of(shape).table(shape))
        self._job = TrainingJob(
            tokens=sum(self._counts),
            window=window,
            longest=max(self._counts),
            elements=sum(training.rank * (module.in_features + module.out_features) for module in chosen),
            lowest=min(module.group for module in chosen),
        )
        self._kept = inputs_tier(self._size, self._job, machine)
        self.left = reserved(self._size, self._job, machine, self._kept)

    def figures(self, shop: Shop, plan: Plan, placement: WeightPlacement) -> dict[str, Any]:
        """The part of the plan's JSON that is about training: ``together`` with generation, and ``alone``."""
        layers, compute = self._size.shape.num_layers, "gpu" if self._machine.compute == "gpu" else "cpu"
        batches = cut_batches(self._counts, self._sizes, self._job.window)
        cost = learning_cost(
            self._size,
            shop.profile,
            compute="gpu" if compute == "gpu" else "cpu",
            dtype=plan.dtype,
            held=plan.weights_dtype,
            packed=plan.weight_bits == 4,
            logit_rows=1,
        )
        weights = traffic(sized(shop.units, plan.weight_bits), placement.tiers, cost.precision, compute, layers + 1)
        both = plan_coserving(
            self._size,
            self._job,
            plan,
            routes_of(weights, placement, layers, compute),
            shop.profile,
            kept=self._kept,
            share=self._asked.share,
            batches=len(batches),
        )
        return {
            "steps": self._steps,
            "together": both.to_json(),
            "alone": self._alone(shop, sized(shop.units, plan.weight_bits)),
        }

    def _alone(self, shop: Shop, units: Sequence[UnitSize]) -> dict[str, Any] | None:
        """One batch after the other without generation; None if it does not fit."""
        sizes = self._sizes[:1]
        counts = self._counts[: sizes[0]]
        job = replace(self._job, tokens=sum(counts), longest=max(counts))
        try:
            plan = plan_training(self._size, units, job, self._options, self._machine, stored_dtype=shop.stored_dtype)
        except DoesNotFitError:
            return None
        batches = cut_batches(counts, sizes, job.window)
        visits = reverse_order(self._size.shape.num_layers, len(batches), job.lowest)
        timing = pass_timing(
            self._size,
            units,
            plan,
            visits,
            batches,
            shop.profile,
            "gpu" if shop.machine.compute == "gpu" else "cpu",
        )
        return {
            "window": plan.window,
            "kept": sorted(set(plan.kept.values())),
            "memory": {tier: memory.to_json() for tier, memory in plan.memory.items()},
            "predicted": {
                "pass_s": timing.seconds,
                "tokens_per_s": job.tokens / timing.seconds,
                "bottleneck": timing.bottleneck,
                "resource_s": timing.busy_s,
            },
        }


def _examples(asked: CoFinetune, folder: ModelFolder, codec: TextCodec | None) -> list[Example]:
    data = read_training_rows(asked.data, "--finetune")
    data.require_valid()
    encoder = ExampleEncoder(codec, folder.shape, max_length=asked.training.max_length, template=None)
    found = list(encoder.encode_all([row.content for row in data.rows if row.content is not None]))
    data.with_faults([each if isinstance(each, str) else None for each in found]).require_valid()
    examples = [each for each in found if isinstance(each, Example)]
    if not any(any(each.trained) for each in examples):
        raise UsageError(f"--finetune {asked.data}: no row has a token to learn: there is nothing to plan")
    return examples
