"""One adapter from its rows to its folder: what is checked first, where a stopped training goes on, what is written.

Says in which order things happen. Everything that can be wrong is looked for before the weights are loaded; how a
training is shown to people, and what a signal means, is the surface's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexbatch.checkpoint.hub import SHORT_NAMES
from flexbatch.checkpoint.locate import ModelFolder
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.errors import AdapterError, FlexbatchError, InputError, UsageError
from flexbatch.finetune.checkpoints import Checkpoint, Checkpoints, Record
from flexbatch.finetune.examples import Example, ExampleEncoder, Examples, require_window
from flexbatch.finetune.optimizer import NamedTensors, make_optimizer
from flexbatch.finetune.options import FinetuneOptions
from flexbatch.finetune.output import (
    AdapterSettings,
    CardFacts,
    check_output,
    model_card,
    module_names,
    move_into_place,
    remove_output,
    target_names,
    write_adapter,
    write_text,
)
from flexbatch.finetune.schedule import Course
from flexbatch.finetune.training import Held, Observer, TrainerLike, Training
from flexbatch.jobs.identity import JobIdentity, from_json
from flexbatch.jobs.training_rows import Chat, Completion, Text, TrainingData
from flexbatch.lora.folders import CONFIG, fingerprint
from flexbatch.lora.modules import modules_of
from flexbatch.models.registry import family_of
from flexbatch.options import EngineOptions
from flexbatch.runtime.setup import disk_folder
from flexbatch.text.codec import TextCodec

HISTORY = "training.json"
"""The file in an adapter's folder that says which job made it, and every loss."""


@dataclass(frozen=True, slots=True)
class FinetuneTask:
    """What is asked for: everything that is known before a row is encoded. ``template`` is a chat template's text.

    ``option`` is what messages call the output's place by.
    """

    folder: ModelFolder
    fingerprint: str
    codec: TextCodec | None
    data: TrainingData
    output: Path
    options: FinetuneOptions
    engine: EngineOptions
    template: str | None = None
    overwrite: bool = False
    version: str = ""
    option: str = "--output"

    def identity(self) -> JobIdentity:
        """What makes two trainings the same."""
        options = self.options
        settings = {
            **options.result_settings(),
            "init_from": None if options.init_from is None else fingerprint({"": options.init_from}, [""]),
            "chat_template": self.template,
            "dtype": self.engine.dtype,
            "dummy_weights": self.folder.dummy,
        }
        return JobIdentity(self.folder.name, self.fingerprint, self.data.digest, settings, {})


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a trainer has to know of the data: how many examples came before (of earlier runs), and how large they get.

    ``batch_tokens``: of all examples of the largest batch, ``step_tokens``: of the largest step; ``longest``: of the
    longest example.
    """

    examples_done: int
    batch_tokens: int
    step_tokens: int
    longest: int


MakeParameters = Callable[[FinetuneTask], NamedTensors]
MakeTrainer = Callable[[FinetuneTask, NamedTensors, Sizes], TrainerLike]


class FinetuneJob:
    """A task in the doing, or what is left of it. ``close`` it; ``record`` says what has happened.

    Making one encodes the rows and looks for checkpoints. Raises InputError listing bad rows, or where checkpoints
    belong to another job; UsageError where the output cannot go where it should.
    """

    def __init__(self, task: FinetuneTask) -> None:
        self.task = task
        self.record = Record()
        self.warnings: list[str] = []
        self.begun = False
        self._identity = task.identity()
        self._training: Training | None = None
        self.completed = self._completed()
        if self.completed is not None:
            self.record = self.completed
            if Path(f"{task.output}.part").is_dir():  # the run that completed it died just then
                Checkpoints(task.output).remove()
            return
        check_output(task.output, overwrite=task.overwrite, option=task.option)
        self._settings_from = _inherited(task.options.init_from)
        self._examples = self._encode()
        self.course = Course.of(task.options, len(self._examples))
        self._checkpoints = Checkpoints(task.output, task.option)
        try:
            self._found = None if task.overwrite else self._checkpoint()
        except BaseException:
            self._checkpoints.close()
            raise

    @property
    def resumed(self) -> int:
        """Steps that an earlier run has done."""
        return 0 if self._found is None else self._found.record.steps

    def run(
        self,
        parameters: MakeParameters,
        trainer: MakeTrainer,
        observe: Observer,
        held: Held = nullcontext,
        keep_on: tuple[type[BaseException], ...] = (),
    ) -> None:
        """Train, and write the output; ``keep_on`` are the exceptions that steps are kept for when they end it.

        Raises DivergedError, DoesNotFitError, what the trainer raises, and what ``observe`` and signals do.
        """
        task = self.task
        tensors = parameters(task)
        settings = self._settings(tensors)
        folder = self._checkpoints.path if task.engine.disk_dir is None else disk_folder(task.engine)
        with ExitStack() as opened:
            optimizer = opened.enter_context(closing(make_optimizer(task.options, tensors, folder)))
            training = Training(
                task.options,
                self.course,
                self._examples,
                tensors,
                optimizer,
                self._checkpoints,
                self._identity,
                settings,
            )
            if self._found is not None:
                training.resume(self._found)
            self.record = training.record
            if self.record.steps < self.course.steps:
                made = opened.enter_context(closing(trainer(task, tensors, self.sizes(training.examples_done))))
                if task.overwrite:
                    self._checkpoints.clear()
                    remove_output(task.output)
                self._training = training
                self.begun = True
                try:
                    training.run(made, observe, held)
                except keep_on:
                    with suppress(FlexbatchError):  # the checkpoint before is there still
                        training.save()
                    raise
        with held():
            self._finish(tensors, settings)

    def sizes(self, done: int = 0) -> Sizes:
        """What a trainer has to know of the data, ``done`` examples of which came before."""
        examples, course = self._examples, self.course
        steps = [course.batches(step) for step in range(min(course.steps, course.steps_per_epoch))]
        lengths = [[[examples.length(row) for row in rows] for rows in step] for step in steps]
        return Sizes(
            done,
            batch_tokens=max(sum(batch) for step in lengths for batch in step),
            step_tokens=max(sum(map(sum, step)) for step in lengths),
            longest=max(max(batch) for step in lengths for batch in step),
        )

    @property
    def kept_steps(self) -> int:
        """Steps in that checkpoint."""
        return 0 if self._training is None else self._training.kept_steps

    @property
    def kept(self) -> Path | None:
        """The checkpoint that is there, of this run or an earlier one."""
        return None if self._training is None else self._training.kept

    def close(self) -> None:
        """Let go of the output's place."""
        if self.completed is None:
            self._checkpoints.close()

    def stats(self) -> dict[str, Any]:
        """The contract's figures of a training, steps of earlier runs included."""
        record = self.record
        return {
            "steps": record.steps,
            "losses": record.losses,
            "tokens": record.tokens,
            "trained_tokens": record.trained_tokens,
            "train_s": record.seconds,
            "tokens_per_s": record.tokens / record.seconds if record.seconds else 0.0,
            "peak_activation_bytes": record.peak_activation_bytes,
        }

    # --- before the model is loaded ----------------------------------------------------------------------------

    def _completed(self) -> Record | None:
        """The record of the same job if its output is there."""
        path = self.task.output / HISTORY
        if self.task.overwrite or not path.is_file():
            return None
        try:
            value = json.loads(path.read_bytes())
            identity, record = from_json(value["job"]), Record(**value["record"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if identity is None or not (self.task.output / CONFIG).is_file():
            return None
        if found := self._identity.differences(identity):
            remedy = "choose another name, or replace it with --overwrite"
            raise UsageError(
                f"{self.task.option} {self.task.output}: exists, from a training that differs in "
                f"{', '.join(found)}: {remedy}"
            )
        return record

    def _encode(self) -> Examples:
        task = self.task
        task.data.require_valid()
        require_window(task.options.max_length, task.folder.shape)
        encoder = ExampleEncoder(
            task.codec, task.folder.shape, max_length=task.options.max_length, template=task.template
        )
        contents = [row.content for row in task.data.rows if row.content is not None]
        examples, faults = _encoded(encoder, contents)
        task.data.with_faults(faults).require_valid()
        if encoder.cut:
            limit = task.options.max_length
            self.warnings.append(f"{encoder.cut} of {len(examples)} rows were cut to --max-length {limit} tokens")
        return examples

    def _checkpoint(self) -> Checkpoint | None:
        found = self._checkpoints.latest()
        if found is not None and (differences := self._identity.differences(found.identity)):
            raise InputError(
                f"{found.path} belongs to another training; what differs: {', '.join(differences)}: run with the same "
                "options and rows, or start anew with --overwrite"
            )
        return found

    # --- afterwards --------------------------------------------------------------------------------------------

    def _settings(self, tensors: NamedTensors) -> AdapterSettings:
        task = self.task
        table = family_of(task.folder.shape).table(task.folder.shape)
        adapted = module_names(tensors.names())
        return AdapterSettings(
            base=base_name(task.folder),
            rank=task.options.rank,
            alpha=task.options.alpha,
            modules=target_names(adapted, modules_of(table)),
            dropout=task.options.dropout,
            transposed=bool(table.transposed()),
            inherited=self._settings_from,
        )

    def _finish(self, tensors: NamedTensors, settings: AdapterSettings) -> None:
        task, record = self.task, self.record
        made = self._checkpoints.scratch("output")
        write_adapter(made, settings, tensors, model_card(self._card(tensors, settings)))
        history = {"job": self._identity.to_json(), "record": asdict(record)}
        write_text(made / HISTORY, json.dumps(history, allow_nan=False) + "\n")
        move_into_place(made, task.output)
        self._checkpoints.remove()

    def _card(self, tensors: NamedTensors, settings: AdapterSettings) -> CardFacts:
        task, record = self.task, self.record
        said = settings.to_json()
        return CardFacts(
            name=task.output.absolute().name,
            base=settings.base,
            data=Path(task.data.name).name,
            rows=len(self._examples),
            steps=record.steps,
            epochs=record.steps / self.course.steps_per_epoch,
            tokens=record.tokens,
            trained_tokens=record.trained_tokens,
            parameters=sum(tensors.parameter(name).numel() for name in tensors.names()),
            modules=tuple(said["target_modules"]) if isinstance(said["target_modules"], list) else settings.modules,
            settings={**task.options.result_settings(), "rank": said["r"], "alpha": said["lora_alpha"]},
            first_loss=record.losses[0],
            last_loss=record.losses[-1],
            made_by=f"flexbatch {task.version}".strip(),
        )


def weights_fingerprint(folder: ModelFolder) -> str:
    """Return the hash that tells this model's weights from others; reads headers only."""
    return open_checkpoint(folder, family_of(folder.shape).table(folder.shape)).fingerprint


def base_name(folder: ModelFolder) -> str:
    """Return what PEFT can load the base by: a hub id, or the folder's path."""
    if Path(folder.name).expanduser().exists() or folder.name == "demo":
        return str(folder.path.resolve())
    return SHORT_NAMES.get(folder.name.lower(), folder.name)


def _encoded(
    encoder: ExampleEncoder, contents: Sequence[Text | Completion | Chat]
) -> tuple[Examples, list[str | None]]:
    examples = Examples()
    faults: list[str | None] = []
    for example in encoder.encode_all(contents):
        if isinstance(example, Example):
            examples.append(example)
        faults.append(example if isinstance(example, str) else None)
    return examples, faults


def _inherited(folder: Path | None) -> dict[str, Any] | None:
    """The settings of the adapter that a training begins from."""
    if folder is None:
        return None
    try:
        value = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not valid JSON"
        raise AdapterError(
            f"--init-from {folder}: {CONFIG} cannot be read ({reason}): give an adapter's folder"
        ) from None
    if not isinstance(value, dict):
        raise AdapterError(f"--init-from {folder}: {CONFIG} is no JSON object: give an adapter's folder")
    return value
