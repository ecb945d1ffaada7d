"""What a training begins with: the factors, and the trainer that turns rows into gradients of them.

Knows both the task and the engine's side; nothing of the loop between them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

from flexbatch.errors import DoesNotFitError
from flexbatch.finetune.companion import Companion
from flexbatch.finetune.job import FinetuneJob, FinetuneTask, Sizes
from flexbatch.finetune.optimizer import NamedTensors
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trainer import Trainer
from flexbatch.finetune.training import Observer, Progress
from flexbatch.runtime.engine import Engine


def train(
    task: FinetuneTask,
    loading: Callable[[str, int, int], None] | None = None,
    observe: Observer | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Do a task, or what is left of it, and return its figures; with the weights of ``engine``, if it has room."""
    with closing(FinetuneJob(task)) as job:
        if job.completed is None and not (engine is not None and _lent(engine, job, observe or _unseen)):
            job.run(parameters_of, lambda task, made, sizes: trainer_of(task, made, sizes, loading), observe or _unseen)
        return job.stats()


def _lent(engine: Engine, job: FinetuneJob, observe: Observer) -> bool:
    """Train with an engine's weights; whether it could."""
    if engine.weight_bits != job.task.options.base_bits:
        return False
    companion = Companion(job, parameters_of(job.task), observe)
    try:
        engine.carry(companion.trainer)
    except DoesNotFitError:
        return False
    try:
        companion.start()
        companion.finish()
    finally:
        engine.carry(None)
    return True


def parameters_of(task: FinetuneTask) -> Parameters:
    """The factors of a fresh adapter, or of the one to go on from. Raises UsageError or AdapterError for wrong ones."""
    options, shape = task.options, task.folder.shape
    if options.init_from is not None:
        return Parameters.read(shape, options.init_from)
    return Parameters.create(
        shape,
        rank=options.rank,
        alpha=options.alpha,
        target_modules=options.target_modules,
        seed=options.seed,
    )


def trainer_of(
    task: FinetuneTask, tensors: NamedTensors, sizes: Sizes, progress: Callable[[str, int, int], None] | None
) -> Trainer:
    """Load the weights for training ``tensors``, which ``parameters_of`` made."""
    assert isinstance(tensors, Parameters)
    options = task.options
    trainer = Trainer(
        task.folder,
        tensors,
        replace(task.engine, weight_bits=options.base_bits),
        window=options.window,
        dropout=options.dropout,
        seed=options.seed,
        tokens=sizes.batch_tokens,
        longest=sizes.longest,
        progress=progress,
    )
    trainer.seen = sizes.examples_done
    return trainer


def _unseen(progress: Progress) -> None:
    del progress
