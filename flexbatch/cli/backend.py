"""The model's side of a job, imported only when it is needed: locating, encoding, and the engine.

The one place of the command line that knows torch and transformers stand behind it; tests put another engine here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexbatch.options import EngineOptions
from flexbatch.requests import Request, Result, TokenizedRequest

if TYPE_CHECKING:
    from flexbatch.checkpoint.locate import ModelFolder
    from flexbatch.finetune.job import FinetuneJob, FinetuneTask, Sizes
    from flexbatch.finetune.optimizer import NamedTensors
    from flexbatch.finetune.training import Observer, TrainerLike
    from flexbatch.runtime.passenger import Passenger
    from flexbatch.text.codec import TextCodec

LoadProgress = Callable[[str, int, int], None]


class PlanLike(Protocol):
    """What a job needs of a plan."""

    def to_json(self) -> dict[str, Any]:
        """The contract's plan object, with ``dtype``."""


class SnapshotLike(Protocol):
    """How far an engine is: tokens of finished and running rows."""

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens computed."""

    @property
    def completion_tokens(self) -> int:
        """Tokens generated."""


class EngineLike(Protocol):
    """What a job needs of an engine."""

    @property
    def plan(self) -> PlanLike:
        """What was decided."""

    def run(self, requests: Sequence[TokenizedRequest]) -> Iterator[Result]:
        """Yield results in the order they finish."""

    def snapshot(self) -> SnapshotLike:
        """How far the run is; asked from another thread."""

    def stats(self) -> dict[str, Any]:
        """The contract's stats, less the counts of rows."""

    def write_trace(self, path: Path) -> None:
        """Write the timeline."""

    def close(self) -> None:
        """Release everything."""


class CompanionLike(Protocol):
    """What a job needs of a training that shares its engine."""

    @property
    def trainer(self) -> Passenger:
        """What the engine takes along."""

    def start(self) -> None:
        """Begin; the engine is there."""

    def finish(self) -> None:
        """Do what is left without inference; raise what ended it."""

    def abandon(self, error: BaseException) -> None:
        """End it; finished steps are kept."""

    def close(self) -> None:
        """End it if it is under way still."""

    def stats(self) -> dict[str, Any]:
        """What was chosen, under ``plan``, and what it cost."""


class Backend:
    """The real thing. Every method imports what it needs."""

    def locate(self, model: str, *, dummy: bool) -> ModelFolder:
        """Return the model's folder; ModelError if it is not found or not supported."""
        from flexbatch.checkpoint.locate import locate

        return locate(model, dummy=dummy)

    def fingerprint(self, folder: ModelFolder) -> str:
        """Return the hash that tells this model's weights from others; reads headers only."""
        from flexbatch.checkpoint.reader import open_checkpoint
        from flexbatch.models.registry import family_of

        return open_checkpoint(folder, family_of(folder.shape).table(folder.shape)).fingerprint

    def codec(self, folder: ModelFolder) -> TextCodec | None:
        """Return the model's tokenizer, or None if its folder has none."""
        from flexbatch.text.codec import TextCodec

        return TextCodec.load_if_present(folder.path)

    def encode(
        self,
        folder: ModelFolder,
        codec: TextCodec | None,
        requests: Sequence[Request],
        *,
        chat: bool,
        template: str | None,
    ) -> list[tuple[int, ...] | str]:
        """Return each request's prompt as token ids, or the reason why it cannot be used."""
        from flexbatch.text.prompts import PromptEncoder

        return PromptEncoder(codec, folder.shape, chat=chat, template=template).encode_all(requests)

    def refused_adapters(self, folder: ModelFolder, adapters: Mapping[str, Path]) -> dict[str, str]:
        """Return why adapters are not supported by this model or at all; those that cannot be read are not among them.

        Reads settings and headers only.
        """
        from flexbatch.lora.adapter import UnreadableAdapterError
        from flexbatch.lora.reader import AdapterReader, open_adapters
        from flexbatch.models.registry import family_of

        reader = AdapterReader(family_of(folder.shape).table(folder.shape), folder.shape.family)
        _, failed = open_adapters(reader, adapters, adapters)
        return {name: str(error) for name, error in failed.items() if not isinstance(error, UnreadableAdapterError)}

    def engine(
        self,
        folder: ModelFolder,
        codec: TextCodec | None,
        options: EngineOptions,
        requests: Sequence[TokenizedRequest],
        progress: LoadProgress,
        *,
        trace: bool,
        adapters: Mapping[str, Path],
        passenger: Passenger | None = None,
    ) -> EngineLike:
        """Plan for ``requests`` and load the model; ``passenger`` shares its sweeps."""
        from flexbatch.policy.workload import Workload
        from flexbatch.runtime.engine import Engine

        workload = Workload.of(requests, share_prefixes=options.share_prefixes)
        return Engine(folder, codec, options, workload, progress, trace=trace, adapters=adapters, passenger=passenger)

    def companion(self, job: FinetuneJob, observe: Observer, *, share: float) -> CompanionLike:
        """Make a training ready that shares an engine."""
        from flexbatch.finetune.companion import Companion
        from flexbatch.finetune.start import parameters_of

        return Companion(job, parameters_of(job.task), observe, share=share)

    def parameters(self, task: FinetuneTask) -> NamedTensors:
        """Return the factors that a training begins with."""
        from flexbatch.finetune.start import parameters_of

        return parameters_of(task)

    def trainer(
        self, task: FinetuneTask, parameters: NamedTensors, sizes: Sizes, progress: LoadProgress
    ) -> TrainerLike:
        """Load the model for training ``parameters``."""
        from flexbatch.finetune.start import trainer_of

        return trainer_of(task, parameters, sizes, progress)


def resolved(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a plan made of the options that may be ``auto`` and change results."""
    return {name: plan[name] for name in ("dtype", "weight_bits", "kv_bits")}
