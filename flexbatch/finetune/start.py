"""What a training begins with: the factors, and the trainer that turns rows into gradients of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flexbatch.errors import InternalError

if TYPE_CHECKING:
    from flexbatch.finetune.job import FinetuneTask
    from flexbatch.finetune.optimizer import NamedTensors
    from flexbatch.finetune.training import TrainerLike


def parameters_of(task: FinetuneTask) -> NamedTensors:
    """The factors of a fresh adapter, or of the one to go on from."""
    raise InternalError("")


def trainer_of(
    task: FinetuneTask, parameters: NamedTensors, examples_done: int, progress: Callable[[str, int, int], None]
) -> TrainerLike:
    """The trainer; it loads the weights."""
    raise InternalError("")
