"""The factors that a task trains, as they are when it begins."""

from __future__ import annotations

from flexbatch.finetune.job import FinetuneTask
from flexbatch.finetune.parameters import Parameters


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
