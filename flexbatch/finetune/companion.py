"""A finetuning job beside inference: its loop runs in a thread of its own, its products in the thread of the sweeps.

Knows the job and the trainer that rides; neither rows to generate for nor how progress is shown.
"""

from __future__ import annotations

import threading
from typing import Any

from flexbatch.finetune.coserving import CoServingTrainer, EndedError
from flexbatch.finetune.job import FinetuneJob, FinetuneTask, Sizes
from flexbatch.finetune.optimizer import NamedTensors
from flexbatch.finetune.options import SHARE
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.training import Observer
from flexbatch.models.registry import family_of
from flexbatch.models.spec import model_size
from flexbatch.runtime.threads import keep_to_one_core
from flexbatch.scheduler.training import Order


class Companion:
    """A job that is not complete, ready to share an engine: ``trainer`` is the passenger to open it with.

    Once the engine is there, ``start`` it; when inference is over, ``finish`` it, or ``abandon`` it where something
    went wrong. ``parameters`` are what the job begins with; ``observe`` is called in its thread.
    """

    def __init__(
        self,
        job: FinetuneJob,
        parameters: Parameters,
        observe: Observer,
        *,
        share: float = SHARE,
        order: Order | None = None,
    ) -> None:
        task, sizes = job.task, job.sizes()
        options, shape = task.options, task.folder.shape
        self.job = job
        self._observe = observe
        self._parameters = parameters
        self.trainer = CoServingTrainer(
            self._parameters,
            task.engine,
            model_size(shape, family_of(shape).table(shape)),
            window=options.window,
            dropout=options.dropout,
            seed=options.seed,
            tokens=sizes.step_tokens,
            longest=sizes.longest,
            share=share,
            order=order,
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Let the job begin. The engine has been opened."""
        self._thread = threading.Thread(target=self._run, name="finetuning")
        self._thread.start()

    def finish(self) -> None:
        """Do what is left of the job without inference; raises what ended it. For the thread that ran the sweeps."""
        try:
            self.trainer.drive()
        except BaseException as error:
            self.abandon(error)
            raise
        self._join()
        if self._error is not None:
            raise self._error

    def abandon(self, error: BaseException) -> None:
        """End the job; the steps that it has finished are kept."""
        self.trainer.leave(error)
        self._join()

    def close(self) -> None:
        """End the job if it is under way still, for a signal may strike where nobody could ``abandon`` it."""
        if self._running is not None:
            self.abandon(EndedError("the run is over"))

    @property
    def is_started(self) -> bool:
        """Whether the job has begun."""
        return self._thread is not None

    def stats(self) -> dict[str, Any]:
        """What is said of the order that was chosen, and what it cost inference."""
        return self.trainer.stats()

    @property
    def _running(self) -> threading.Thread | None:
        return self._thread if self._thread is not None and self._thread.is_alive() else None

    def _join(self) -> None:
        if (thread := self._running) is not None:
            thread.join()

    def _run(self) -> None:
        try:
            keep_to_one_core()
            self.job.run(self._made, self._ready, self._observe, keep_on=(EndedError,))
        except BaseException as error:  # noqa: BLE001  raised again by ``finish``
            self._error = error
        finally:
            self.trainer.close()

    def _made(self, task: FinetuneTask) -> NamedTensors:
        del task
        return self._parameters

    def _ready(self, task: FinetuneTask, made: NamedTensors, sizes: Sizes) -> CoServingTrainer:
        del task, made
        self.trainer.seen = sizes.examples_done
        return self.trainer
