"""What a training begins with: the factors, and the trainer that turns rows into gradients of them.

Knows both the task and the engine's side; nothing of the loop between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flexbatch.finetune.job import FinetuneTask, Sizes
from flexbatch.finetune.optimizer import NamedTensors
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.trainer import Trainer


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
