"""``flexbatch finetune``: one adapter from its rows to its folder, or to checkpoints that the next run goes on from.

Knows signals, files to check and what people see; the order of a training stands in ``finetune/job.py``.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from flexbatch import __version__
from flexbatch.cli.backend import Backend
from flexbatch.cli.console import Console, print_error
from flexbatch.cli.finetune_options import FinetuneCommand
from flexbatch.cli.progress import LoadMeter, TrainMeter
from flexbatch.cli.report import write_stats
from flexbatch.cli.signals import Interrupted, Stop, interruptible
from flexbatch.errors import DivergedError, ExitCode, FlexbatchError
from flexbatch.jobs.output import check_distinct, check_place
from flexbatch.jobs.training_rows import read_training_rows
from flexbatch.units import format_duration

if TYPE_CHECKING:
    from flexbatch.finetune.job import FinetuneJob


def run_finetune(command: FinetuneCommand, backend: Backend, words: Sequence[str]) -> ExitCode:
    """Train the adapter, or do what is left of it, and return DONE.

    An interruption returns its exit code after saying how ``words``, which started this run, goes on. Raises
    FlexbatchError; checkpoints written until then are kept.
    """
    console = Console(quiet=command.quiet)
    with interruptible() as stop:
        try:
            job = _prepared(command, backend, console)
        except Interrupted as interrupted:
            print_error("flexbatch: interrupted before the first step")
            return interrupted.exit_code
        with closing(job):
            try:
                return _finetune(command, backend, console, job, stop)
            except Interrupted as interrupted:
                begun = job.begun
                said = (
                    "" if job.kept is None else f"; {job.kept_steps} of {job.course.steps} steps are kept in {job.kept}"
                )
                again = shlex.join(word for word in words if word != "--overwrite" or not begun)
                print_error(f"flexbatch: interrupted{said}; continue with:\n  {again}")
                return interrupted.exit_code
            except DivergedError:
                raise  # it says itself what is kept, and the same command would not help
            except Exception as error:
                if job.completed is None and job.kept is not None:
                    error.add_note(f"checkpoint {job.kept} is kept: the same command goes on from there")
                raise


def _prepared(command: FinetuneCommand, backend: Backend, console: Console) -> FinetuneJob:
    """Look for everything that can be wrong before the weights are loaded."""
    places = {"--data": command.data}
    if command.stats is not None:
        check_place("--stats", command.stats)
        places["--stats"] = command.stats
    check_distinct({**places, "--output": command.output})
    data = read_training_rows(command.data)
    data.require_valid()
    folder = backend.locate(command.model, dummy=command.dummy_weights)
    for warning in folder.warnings:
        console.warn(warning)

    from flexbatch.finetune.job import FinetuneJob, FinetuneTask  # needs torch: only when there is something to do

    task = FinetuneTask(
        folder=folder,
        fingerprint=backend.fingerprint(folder),
        codec=backend.codec(folder),
        data=data,
        output=command.output,
        options=command.training,
        engine=command.engine,
        version=__version__,
        template=command.template,
        overwrite=command.overwrite,
    )
    job = FinetuneJob(task)
    for warning in job.warnings:
        console.warn(warning)
    return job


def _finetune(command: FinetuneCommand, backend: Backend, console: Console, job: FinetuneJob, stop: Stop) -> ExitCode:
    if job.completed is not None:
        console.say(f"{command.output} is already complete: {job.completed.steps} steps")
        return _finish(command, console, job)
    course = job.course
    console.say(
        f"{course.rows} rows, {course.steps} steps of {course.batch_size * course.grad_accumulation} rows"
        + (f"; going on from {command.output}.part: {job.resumed} steps are done" if job.resumed else "")
    )
    with closing(LoadMeter(console)) as loading, TrainMeter(console) as meter:
        job.run(
            backend.parameters,
            lambda task, made, sizes: backend.trainer(task, made, sizes, loading),
            meter,
            stop.held,
            keep_on=(Interrupted,),
        )
    rate = job.stats()["tokens_per_s"]
    speed = f"{job.record.tokens} tokens in {format_duration(job.record.seconds)}, {rate:.1f} tokens/s"
    losses = job.record.losses
    console.say(f"{command.output}: {job.record.steps} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}; {speed}")
    return _finish(command, console, job)


def _finish(command: FinetuneCommand, console: Console, job: FinetuneJob) -> ExitCode:
    if command.stats is not None:
        write_stats(command.stats, job.stats())
    from flexbatch.finetune.plot import draw_losses

    picture = Path(f"{command.output}.loss.png")
    try:
        draw_losses(picture, job.record.losses, command.output.absolute().name)
    except FlexbatchError as error:
        console.warn(str(error))
    return ExitCode.DONE
