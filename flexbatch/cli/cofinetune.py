"""The finetuning half of ``flexbatch run --finetune``: what is checked first, how both jobs go on, what is said of it.

How a training goes on stands in ``finetune/job.py``; how it shares sweeps, in ``finetune/coserving.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbatch import __version__
from flexbatch.cli.backend import Backend, CompanionLike
from flexbatch.cli.console import Console
from flexbatch.cli.progress import LoadMeter, TrainingProgress, TrainMeter
from flexbatch.cli.signals import Interrupted, Stop
from flexbatch.errors import FlexbatchError, UsageError
from flexbatch.finetune.options import FinetuneOptions
from flexbatch.jobs.training_rows import read_training_rows
from flexbatch.options import EngineOptions

if TYPE_CHECKING:
    from flexbatch.checkpoint.locate import ModelFolder
    from flexbatch.finetune.job import FinetuneJob
    from flexbatch.text.codec import TextCodec


@dataclass(frozen=True, slots=True)
class CoFinetune:
    """What ``--finetune`` asks for. ``share``: the part of its time that generation may lose."""

    data: Path
    output: Path
    training: FinetuneOptions
    share: float

    def places(self) -> dict[str, Path]:
        """Its files by their options."""
        return {"--finetune": self.data, "--adapter-output": self.output, "its checkpoints": self.part}

    @property
    def part(self) -> Path:
        """Where its checkpoints lie."""
        return Path(f"{self.output}.part")


class Beside:
    """The finetuning job of one run, from its rows to its adapter; ``close`` it."""

    def __init__(
        self,
        asked: CoFinetune,
        backend: Backend,
        console: Console,
        folder: ModelFolder,
        codec: TextCodec | None,
        engine: EngineOptions,
        *,
        template: str | None,
        overwrite: bool,
    ) -> None:
        from flexbatch.finetune.job import FinetuneJob, FinetuneTask  # needs torch: only when there is something to do

        self.asked = asked
        self._backend = backend
        self._console = console
        self._companion: CompanionLike | None = None
        self._newest: TrainingProgress | None = None
        self._meter: TrainMeter | None = None
        data = read_training_rows(asked.data, "--finetune")
        data.require_valid()
        task = FinetuneTask(
            folder=folder,
            fingerprint=backend.fingerprint(folder),
            codec=codec,
            data=data,
            output=asked.output,
            options=asked.training,
            engine=engine,
            version=__version__,
            template=template,
            overwrite=overwrite,
            option="--adapter-output",
        )
        self.job: FinetuneJob = FinetuneJob(task)
        for warning in self.job.warnings:
            console.warn(warning)

    @property
    def is_complete(self) -> bool:
        """Whether the adapter was there already."""
        return self.job.completed is not None

    @property
    def begun(self) -> bool:
        """Whether something of an earlier adapter may be gone."""
        return self.job.begun

    def passenger(self) -> Any:
        """What the engine has to take along, or None if there is nothing left to train."""
        if self.is_complete:
            return None
        self._companion = self._backend.companion(self.job, self._observe, share=self.asked.share)
        return self._companion.trainer

    @contextmanager
    def alongside(self) -> Iterator[None]:
        """Train while the block generates, with the engine that has been opened; its failure ends training, too."""
        try:
            self._start()
            yield
        except BaseException as error:
            if self._companion is not None:
                self._companion.abandon(error)
            raise

    def _start(self) -> None:
        self._announce()
        if self._companion is not None:
            said = self._companion.stats()["plan"]
            if said is not None:
                self._console.say(f"finetuning goes {_ORDERS[said['order']]} ({said['reason']})")
            self._companion.start()

    def status(self) -> str:
        """How far it is, in words."""
        now = self._newest
        return "" if now is None else f"; adapter {now.step}/{now.steps} steps, loss {now.loss:.4f}"

    def finish(self, stop: Stop) -> None:
        """Generation is done: do what is left of training. Raises what ended it."""
        if self._companion is None:
            self._alone(stop)
            return
        with TrainMeter(self._console) as self._meter:
            self._companion.finish()

    def close(self) -> None:
        """Let go of the adapter's place; what is under way ends."""
        if self._companion is not None:
            self._companion.close()
        self.job.close()

    def kept(self) -> str:
        """Say which steps survive the run's end, if any do."""
        if self.is_complete or self.job.kept is None or not self.job.kept.exists():
            return ""
        return f"{self.job.kept_steps} of {self.job.course.steps} steps are kept in {self.job.kept}"

    def added_to(self, stats: dict[str, Any]) -> dict[str, Any]:
        """The run's figures with the contract's of a training, and how it shared the sweeps."""
        shared = None if self._companion is None else self._companion.stats()
        moved = dict(stats["moved_bytes"])
        for resource, nbytes in ({} if shared is None else shared["moved_bytes"]).items():
            moved[resource] = moved.get(resource, 0) + nbytes
        return {**stats, "moved_bytes": moved, **self.job.stats(), "finetune": shared}

    def report(self) -> None:
        """Draw the losses, and say what came of it."""
        from flexbatch.finetune.plot import draw_losses

        record, output = self.job.record, self.asked.output
        try:
            draw_losses(Path(f"{output}.loss.png"), record.losses, output.absolute().name)
        except FlexbatchError as error:
            self._console.warn(str(error))
        if self.is_complete:
            self._console.say(f"{output} is already complete: {record.steps} steps")
            return
        rate = self.job.stats()["tokens_per_s"]
        losses = f"loss {record.losses[0]:.4f} to {record.losses[-1]:.4f}"
        self._console.say(f"{output}: {record.steps} steps, {losses}; {record.tokens} tokens, {rate:.1f} tokens/s")

    def _announce(self) -> None:
        if self.is_complete:
            return
        course = self.job.course
        self._console.say(
            f"{course.rows} rows to train on, {course.steps} steps of {course.batch_size * course.grad_accumulation}"
            + (f"; going on from {self.asked.part}: {self.job.resumed} steps are done" if self.job.resumed else "")
        )

    def _observe(self, progress: TrainingProgress) -> None:
        self._newest = progress
        if self._meter is not None:
            self._meter(progress)

    def _alone(self, stop: Stop) -> None:
        """Without an engine: as ``flexbatch finetune`` does."""
        if self.is_complete:
            return
        self._announce()
        with closing(LoadMeter(self._console)) as loading, TrainMeter(self._console) as meter:
            self.job.run(
                self._backend.parameters,
                lambda task, made, sizes: self._backend.trainer(task, made, sizes, loading),
                meter,
                stop.held,
                keep_on=(Interrupted,),
            )


_ORDERS = {"riding": "along with the sweeps", "reverse": "between the sweeps"}


def agreed(training: FinetuneOptions, engine: EngineOptions, base_bits: int | None) -> FinetuneOptions:
    """The options of training on the weights that generation uses. Raises UsageError if two options contradict."""
    bits = engine.weight_bits
    if bits is None:
        raise UsageError("--weight-bits auto: with --finetune it has to be known what is trained on: give 16 or 4")
    if base_bits not in (None, bits):
        raise UsageError(f"--base-bits {base_bits}: training shares the weights of --weight-bits {bits}: leave it out")
    return replace(training, base_bits=bits)
