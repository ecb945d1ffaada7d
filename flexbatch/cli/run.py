"""``flexbatch run``: one job from its input file to its complete output, or to a journal that the next run continues.

Says in which order things happen; how each is done stands in ``jobs/`` (files), ``backend.py`` (the model) and the
engine behind it. Everything that can be wrong is looked for before the weights are loaded.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flexbatch.cli.backend import Backend, EngineLike, resolved
from flexbatch.cli.cofinetune import Beside
from flexbatch.cli.console import Console, print_error
from flexbatch.cli.lines import LineWriter, invalid_line
from flexbatch.cli.options import RunOptions
from flexbatch.cli.progress import LoadMeter, RunMeter
from flexbatch.cli.report import job_stats, plan_summary, write_stats
from flexbatch.cli.signals import Interrupted, Stop, interruptible
from flexbatch.errors import DivergedError, ExitCode, InternalError, UsageError
from flexbatch.jobs.durable import disk_error
from flexbatch.jobs.identity import JobIdentity
from flexbatch.jobs.journal import Journal
from flexbatch.jobs.output import CompletedJob, check_distinct, check_place, part_path, recall, remember
from flexbatch.jobs.rows import JobInput, Names, Row, read_rows, require_valid
from flexbatch.lora.folders import adapter_folders, fingerprint
from flexbatch.options import EngineOptions
from flexbatch.requests import TokenizedRequest
from flexbatch.units import format_duration

if TYPE_CHECKING:
    from flexbatch.checkpoint.locate import ModelFolder
    from flexbatch.text.codec import TextCodec


def run_job(options: RunOptions, backend: Backend, command: Sequence[str]) -> ExitCode:
    """Do the job, or what is left of it, and return DONE or ROWS_FAILED.

    An interruption returns its exit code after saying how ``command``, the words that started this run, goes on.
    Raises FlexbatchError; rows finished until then are kept, and a note on the error says so.
    """
    job = _Job(options, backend)
    try:
        with interruptible() as stop:
            return job.run(stop)
    except Interrupted as interrupted:
        job.close()
        kept = "".join(f"; {said}" for said in job.kept())
        print_error(f"flexbatch: interrupted{kept}; continue with:\n  {job.resume_command(command)}")
        return interrupted.exit_code
    except DivergedError:
        raise  # it says itself what is kept, and the same command would not help
    except Exception as error:
        if job.kept():
            error.add_note(f"{', '.join(job.kept())}: the same command goes on from there")
        raise
    finally:
        job.close()


class _Job:
    def __init__(self, options: RunOptions, backend: Backend) -> None:
        self._options = options
        self._backend = backend
        self._console = Console(quiet=options.quiet)
        self._part = part_path(options.output)
        self._journal: Journal | None = None
        self._rows: Sequence[Row] = ()
        self._adapters: dict[str, Path] = {}
        self._resumed = 0
        self._begun = False
        self._beside: Beside | None = None

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        if self._beside is not None:
            self._beside.close()

    def kept(self) -> list[str]:
        """Say which rows of this job, and which steps of training, survive its end, if any do."""
        said = [] if self._beside is None or not self._beside.kept() else [self._beside.kept()]
        if not self._begun or self._journal is None or self._journal.rows_done == 0 or not self._part.exists():
            return said
        return [f"{self._journal.rows_done} of {len(self._rows)} rows are kept in {self._part}", *said]

    def resume_command(self, command: Sequence[str]) -> str:
        """Return the command that continues this job: once it has begun, ``--overwrite`` would start anew."""
        begun = self._begun and (self._beside is None or self._beside.begun)
        words = [word for word in command if word != "--overwrite" or not begun]
        return shlex.join(words) + ("  (with the same rows on stdin)" if self._options.input == "-" else "")

    def run(self, stop: Stop) -> ExitCode:
        options = self._options
        self._check_places()
        folders = adapter_folders(options.lora, options.lora_dir)
        job_input = read_rows(options.input, options.params, Names(folders, options.model))
        self._rows = job_input.rows
        if not options.skip_invalid:
            require_valid(job_input.name, self._rows)
        completed = self._completed()
        if completed is None:
            ids = [row.id if row.error is None else None for row in self._rows]
            self._journal = Journal(self._part, ids, fresh=options.overwrite)
        folder = self._backend.locate(options.model, dummy=options.dummy_weights)
        for warning in folder.warnings:
            self._console.warn(warning)
        used = {row.request.lora for row in self._rows if row.request is not None}
        self._adapters = {name: path for name, path in folders.items() if name in used}
        identity = self._identity(job_input, folder)
        if completed is not None:
            return self._report_completed(completed, identity, folder, stop)
        assert self._journal is not None
        self._journal.require_same(identity)
        if self._journal.identity is not None:
            identity = identity.adopt(self._journal.identity)
        codec = self._backend.codec(folder)
        self._find_training(folder, codec)
        self._refuse_adapters(job_input, folder)
        requests = self._encode(job_input, folder, codec)
        pending = [request for request in requests if not self._journal.is_done(request.index)]
        if pending and not options.overwrite and options.output.exists():
            raise UsageError(f"{options.output} exists, but {self._part} is not finished: remove one of the two")
        started = time.monotonic()
        if pending:
            with closing(self._open_engine(folder, codec, identity, pending)) as engine:
                identity = replace(identity, resolved=resolved(engine.plan.to_json()))
                self._begin(identity)
                with nullcontext() if self._beside is None else self._beside.alongside():
                    self._generate(engine, pending, LineWriter(folder.name, codec), stop)
                    failed = self._complete(identity)
                return self._finish(failed, engine, time.monotonic() - started, stop)
        self._begin(identity)
        return self._finish(self._complete(identity), None, time.monotonic() - started, stop)

    # --- before the model is loaded ----------------------------------------------------------------------------

    def _check_places(self) -> None:
        options = self._options
        if str(options.output) == "-":
            raise UsageError("--output -: results cannot go to stdout, for an interrupted job continues from its file")
        places = {"--output": options.output, "--stats": options.stats, "--trace": options.trace}
        given = {option: place for option, place in places.items() if place is not None}
        for option, place in given.items():
            check_place(option, place)
        inputs = {} if options.input == "-" else {"--input": Path(options.input)}
        inputs |= {} if options.finetune is None else options.finetune.places()
        check_distinct({**inputs, **given, f"the journal of --output {options.output}": self._part})

    def _completed(self) -> CompletedJob | None:
        """Return the job that made the output if it is complete; None if there is something to do."""
        output = self._options.output
        journalled = self._part.exists() and self._part.stat().st_size > 0
        if self._options.overwrite or journalled or not output.exists():
            return None
        completed = recall(output)
        if completed is None:
            raise UsageError(f"--output {output}: exists: choose another name, or replace it with --overwrite")
        return completed

    def _report_completed(
        self, completed: CompletedJob, identity: JobIdentity, folder: ModelFolder, stop: Stop
    ) -> ExitCode:
        output = self._options.output
        if found := identity.differences(completed.identity):
            remedy = "choose another name, or replace it with --overwrite"
            raise UsageError(f"--output {output}: exists, from a job that differs in {', '.join(found)}: {remedy}")
        self._console.say(f"{output} is already complete: {completed.rows} rows, {completed.failed} failed")
        if self._options.finetune is not None:
            self._find_training(folder, self._backend.codec(folder))
            self._finish_training(stop)
            self._write_stats(None, completed.failed)
        return ExitCode.ROWS_FAILED if completed.failed else ExitCode.DONE

    def _identity(self, job_input: JobInput, folder: ModelFolder) -> JobIdentity:
        options, params = self._options, self._options.params
        settings = {
            "max_tokens": params.max_tokens,
            "temperature": float(params.temperature),
            "top_p": float(params.top_p),
            "top_k": params.top_k,
            "seed": params.run_seed,
            "stop": list(params.stop),
            "logprobs": params.logprobs,
            "ignore_eos": params.ignore_eos,
            "chat": options.chat,
            "chat_template": options.template,
            "dummy_weights": options.dummy_weights,
        }
        if self._adapters:
            settings["adapters"] = fingerprint(self._adapters, self._adapters)
        engine = options.engine
        asked = {
            "dtype": None if engine.dtype == "auto" else engine.dtype,
            "weight_bits": engine.weight_bits,
            "kv_bits": engine.kv_bits,
        }
        return JobIdentity(folder.name, self._backend.fingerprint(folder), job_input.digest, settings, asked)

    def _find_training(self, folder: ModelFolder, codec: TextCodec | None) -> None:
        """Look for everything that can be wrong with ``--finetune``."""
        options = self._options
        if options.finetune is not None:
            self._beside = Beside(
                options.finetune,
                self._backend,
                self._console,
                folder,
                codec,
                options.engine,
                template=options.template,
                overwrite=options.overwrite,
            )

    def _refuse_adapters(self, job_input: JobInput, folder: ModelFolder) -> None:
        """Make rows invalid whose adapter asks for something that is not supported."""
        if not self._adapters:
            return
        refused = self._backend.refused_adapters(folder, self._adapters)
        self._rows = [
            row.failed(refused[row.request.lora]) if row.request is not None and row.request.lora in refused else row
            for row in self._rows
        ]
        if not self._options.skip_invalid:
            require_valid(job_input.name, self._rows)

    def _encode(self, job_input: JobInput, folder: ModelFolder, codec: TextCodec | None) -> list[TokenizedRequest]:
        """Encode all prompts; rows that the model cannot take become invalid ones."""
        options = self._options
        valid = [row for row in self._rows if row.request is not None]
        requests = [row.request for row in valid if row.request is not None]
        encoded = self._backend.encode(folder, codec, requests, chat=options.chat, template=options.template)
        rows = list(self._rows)
        tokenized: list[TokenizedRequest] = []
        for row, request, tokens in zip(valid, requests, encoded, strict=True):
            if codec is None and request.params.stop:
                tokens = "stop needs a tokenizer, and the model's folder has none"
            if isinstance(tokens, str):
                rows[row.index] = row.failed(tokens)
            else:
                tokenized.append(TokenizedRequest(request, row.index, tokens))
        self._rows = rows
        if not options.skip_invalid:
            require_valid(job_input.name, rows)
        return tokenized

    # --- with the model ----------------------------------------------------------------------------------------

    def _open_engine(
        self, folder: ModelFolder, codec: TextCodec | None, identity: JobIdentity, pending: Sequence[TokenizedRequest]
    ) -> EngineLike:
        options = self._options
        meter = LoadMeter(self._console)
        engine_options = _pinned(options.engine, identity)
        with closing(meter):
            engine = self._backend.engine(
                folder,
                codec,
                engine_options,
                pending,
                meter,
                trace=options.trace is not None,
                adapters=self._adapters,
                passenger=None if self._beside is None else self._beside.passenger(),
            )
        self._console.say(plan_summary(engine.plan.to_json()))
        return engine

    def _begin(self, identity: JobIdentity) -> None:
        """Make the journal ready. From here on an output of an earlier job is gone."""
        assert self._journal is not None
        if self._options.overwrite:
            try:
                self._options.output.unlink(missing_ok=True)
            except OSError as error:
                raise disk_error(error, self._options.output) from None
        self._journal.begin(identity)
        self._begun = True
        self._resumed = self._journal.rows_done

    def _generate(
        self, engine: EngineLike, pending: Sequence[TokenizedRequest], writer: LineWriter, stop: Stop
    ) -> None:
        assert self._journal is not None
        by_id = {request.request.id: request for request in pending}
        shares = {request.index: len(request.token_ids) + request.request.params.max_tokens for request in pending}
        if self._resumed:
            self._console.say(f"going on from {self._part}: {self._resumed} of {len(self._rows)} rows are done")
        planned = list(shares.values())
        rows, beside = len(self._rows), self._beside
        more = None if beside is None else beside.status
        with RunMeter(self._console, engine.snapshot, planned, rows=rows, done=self._resumed, more=more) as meter:
            for result in engine.run(pending):
                request = by_id.pop(result.id)
                line = writer.line(self._rows[request.index], request, result)
                with stop.held():
                    self._journal.append(request.index, line, failed=result.error is not None)
                meter.finished(shares[request.index], result.prompt_tokens + result.completion_tokens)
                stop.check()
        if by_id:
            raise InternalError(f"the engine gave no result for {len(by_id)} rows, such as {next(iter(by_id))!r}")

    # --- afterwards --------------------------------------------------------------------------------------------

    def _complete(self, identity: JobIdentity) -> int:
        """Write the output, for all rows are done; return how many have failed."""
        assert self._journal is not None
        options, journal = self._options, self._journal
        fixed = {row.index: invalid_line(row) for row in self._rows if row.error is not None}
        failed = journal.rows_failed + len(fixed)
        journal.write_output(options.output, fixed)
        remember(options.output, identity, len(self._rows), failed)
        journal.remove()
        return failed

    def _finish(self, failed: int, engine: EngineLike | None, seconds: float, stop: Stop) -> ExitCode:
        options = self._options
        stats = job_stats(engine, rows=len(self._rows), failed=failed, resumed=self._resumed)
        tokens, rate = stats["completion_tokens"], stats["throughput_tok_s"]
        speed = f"{tokens} tokens in {format_duration(seconds)}, {rate:.1f} tokens/s"
        self._console.say(f"{options.output}: {len(self._rows)} rows, {failed} failed; {speed}")
        self._finish_training(stop)
        self._write_stats(engine, failed)
        if options.trace is not None and engine is not None:
            try:
                engine.write_trace(options.trace)
            except OSError as error:
                raise disk_error(error, options.trace) from None
        return ExitCode.ROWS_FAILED if failed else ExitCode.DONE

    def _finish_training(self, stop: Stop) -> None:
        if self._beside is not None:
            self._beside.finish(stop)
            self._beside.report()

    def _write_stats(self, engine: EngineLike | None, failed: int) -> None:
        if self._options.stats is not None:
            stats = job_stats(engine, rows=len(self._rows), failed=failed, resumed=self._resumed)
            write_stats(self._options.stats, stats if self._beside is None else self._beside.added_to(stats))


def _pinned(options: EngineOptions, identity: JobIdentity) -> EngineOptions:
    # A run that continues a journal keeps what `auto` became in the run that began it.
    chosen = identity.resolved
    return replace(
        options,
        dtype=chosen["dtype"] or "auto",
        weight_bits=chosen["weight_bits"],
        kv_bits=chosen["kv_bits"],
    )
