"""The Python API: one class that loads a model and generates or scores. It adds no behaviour of its own.

Everything it does the command line does too, through the same engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from flexbatch.checkpoint.locate import locate
from flexbatch.errors import DoesNotFitError, InputError, UsageError
from flexbatch.finetune.companion import Companion
from flexbatch.finetune.job import FinetuneJob, FinetuneTask, weights_fingerprint
from flexbatch.finetune.options import SHARE, FinetuneOptions, LrSchedule, OptimizerName, StatesPlace
from flexbatch.finetune.start import parameters_of, train
from flexbatch.finetune.training import Progress
from flexbatch.jobs.training_rows import read_training_rows, training_rows
from flexbatch.lora.folders import adapter_folders
from flexbatch.options import DType, EngineOptions, Resource, Schedule
from flexbatch.policy.workload import Workload
from flexbatch.requests import Request, Result, TokenizedRequest
from flexbatch.runtime.engine import Engine
from flexbatch.sampling import SamplingParams
from flexbatch.text.codec import TextCodec
from flexbatch.text.prompts import PromptEncoder
from flexbatch.units import Shares, parse_shares, parse_size

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
Pair = tuple[str, str] | tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is after its context: natural-log probabilities of its tokens under the model.

    ``is_greedy``: whether each of its tokens is the model's first choice.
    """

    logprob: float
    is_greedy: bool
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A LoRA adapter that ``LLM.finetune`` made, in PEFT's format in ``folder``; ``generate`` takes it as ``lora``.

    ``stats``: the command line's ``--stats`` of a training, with ``losses``, one for each step.
    """

    name: str
    folder: Path
    stats: Mapping[str, Any]

    @property
    def losses(self) -> list[float]:
        """The loss of every step: the mean over its tokens, before its update."""
        return list(self.stats["losses"])


Loras = str | TrainedAdapter | Sequence[str | TrainedAdapter | None] | None


class LLM:
    """A model, ready to run prompts: ``LLM("demo").generate(["Once upon a time"])``.

    ``model`` is what the command line's ``--model`` takes; every other argument is the option of the same name.
    ``lora`` maps names to PEFT folders; ``rates`` are the command line's ``--throttle``, bytes/s by resource. Sizes are
    bytes or text such as ``"16GiB"``; shares are ``Shares`` or text such as ``"20,80,0"``. The weights are loaded at
    the first call and kept until ``close``. Raises FlexbatchError subclasses, one clear line each.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        gpu_memory: int | str | None = None,
        cpu_memory: int | str | None = None,
        disk_memory: int | str | None = None,
        disk_dir: str | Path | None = None,
        weights: Shares | str | None = None,
        kv: Shares | str | None = None,
        hidden: Shares | str | None = None,
        cpu_attention: bool | None = None,
        weight_bits: Literal[16, 4] | None = 16,
        kv_bits: Literal[16, 4] | None = 16,
        micro_batch: int | None = None,
        max_sequences: int | None = None,
        schedule: Schedule = "continuous",
        overlap: bool = True,
        dtype: DType = "auto",
        rates: Mapping[Resource, float] | None = None,
        dummy_weights: bool = False,
        chat: bool = False,
        chat_template: str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        lora: Mapping[str, str | Path] | None = None,
        lora_dir: str | Path | None = None,
        adapter_memory: int | str | None = None,
        share_prefixes: bool = True,
    ) -> None:
        self._folder = locate(str(model), dummy=dummy_weights)
        self._options = EngineOptions(
            device=device,
            gpu_memory=_size(gpu_memory),
            cpu_memory=_size(cpu_memory),
            disk_memory=_size(disk_memory),
            disk_dir=None if disk_dir is None else Path(disk_dir),
            weights=_shares(weights, "weights"),
            kv=_shares(kv, "kv"),
            hidden=_shares(hidden, "hidden"),
            cpu_attention=cpu_attention,
            weight_bits=weight_bits,
            kv_bits=kv_bits,
            micro_batch=micro_batch,
            max_sequences=max_sequences,
            schedule=schedule,
            overlap=overlap,
            dtype=dtype,
            rates=rates or {},
            adapter_memory=_size(adapter_memory),
            share_prefixes=share_prefixes,
        )
        named = [(name, Path(path)) for name, path in (lora or {}).items()]
        self._adapters = adapter_folders(named, None if lora_dir is None else Path(lora_dir))
        self._codec = TextCodec.load_if_present(self._folder.path)
        self._encoder = PromptEncoder(self._codec, self._folder.shape, chat=chat, template=chat_template)
        self._template = chat_template
        self._progress = progress
        self._engine: Engine | None = None
        self._companion: Companion | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the weights; a later call loads them again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: Loras = None,
    ) -> list[Result]:
        """Generate for every prompt and return the results in the prompts' order.

        A prompt is text, token ids, or a chat (a list of messages); one alone may be given without a list around it.
        ``params`` and ``lora`` (an adapter or its name; None: the base model) are for all prompts, or one each. A row
        that fails alone has ``error`` set. Raises InputError for a prompt that cannot be used, naming its place in the
        list.
        """
        results = dict(self.generate_each(prompts, params, lora=lora))
        return [results[index] for index in range(len(results))]

    def generate_each(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: Loras = None,
    ) -> Iterator[tuple[int, Result]]:
        """Yield (place of the prompt, result) as rows finish, in any order; else as ``generate``."""
        rows = _prompt_list(prompts)
        each = _for_each(params if params is not None else SamplingParams(), len(rows), "params")
        adapters = self._adapters_for(lora, len(rows))
        requests = [
            _request(index, prompt, settings, adapter)
            for index, (prompt, settings, adapter) in enumerate(zip(rows, each, adapters, strict=True))
        ]
        yield from self._run(self._tokenize(requests))

    def score(self, pairs: Iterable[Pair], *, lora: Loras = None) -> list[Score]:
        """Score each (context, continuation): the log-probability of the continuation after the context.

        Text is encoded together and split where the context's own encoding ends, as evaluation harnesses do; token ids
        are taken as they are. Log-probabilities of the context itself are not computed. ``lora`` as in ``generate``.
        Raises InputError if a context or a continuation is empty, or both are longer than the model's window.
        """
        scores = dict(self.score_each(pairs, lora=lora))
        return [scores[index] for index in range(len(scores))]

    def score_each(self, pairs: Iterable[Pair], *, lora: Loras = None) -> Iterator[tuple[int, Score]]:
        """Yield (place of the pair, score) as pairs finish, in any order; else as ``score``."""
        params = SamplingParams(max_tokens=0, echo=True, logprobs=1)
        encoded = [
            self._encoder.encode_pair(context, continuation, f"pair {index}")
            for index, (context, continuation) in enumerate(pairs)
        ]
        adapters = self._adapters_for(lora, len(encoded))
        requests = [
            TokenizedRequest(Request(str(index), params, prompt=whole, lora=adapter), index, whole, start)
            for index, ((whole, start), adapter) in enumerate(zip(encoded, adapters, strict=True))
        ]
        for index, result in self._run(requests):
            yield index, _score(result, encoded[index][1])

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers has it. Raises UsageError if its folder has none."""
        if self._codec is None:
            raise UsageError("tokenizer: the model's folder has none: add its tokenizer files")
        return self._codec.tokenizer

    @property
    def window(self) -> int:
        """The most tokens that the model can read at once."""
        return self._folder.shape.max_positions

    def finetune(
        self,
        data: str | Path | Iterable[Mapping[str, Any]],
        output: str | Path,
        *,
        name: str | None = None,
        rank: int = 16,
        alpha: float = 32,
        target_modules: str | Sequence[str] = "all-linear",
        learning_rate: float = 2e-4,
        epochs: int | None = None,
        max_steps: int | None = None,
        batch_size: int = 8,
        grad_accumulation: int = 1,
        max_length: int | None = None,
        window: int | None = None,
        optimizer: OptimizerName = "adamw",
        lr_schedule: LrSchedule = "cosine",
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        clip: float = 1.0,
        dropout: float = 0.0,
        seed: int = 0,
        base_bits: Literal[16, 4] = 16,
        init_from: str | Path | None = None,
        save_every: int = 50,
        optimizer_states: StatesPlace = "memory",
        overwrite: bool = False,
        observe: Callable[[Progress], None] | None = None,
    ) -> TrainedAdapter:
        """Train a LoRA adapter on rows (a JSONL file, or objects), write it to ``output``, and return it.

        Arguments are the options of ``flexbatch finetune``; rows are as there. The adapter's ``name`` is its folder's
        unless given, and later calls of ``generate`` may use either it or the name. Weights that are loaded already are
        used, if there is room beside them. ``observe`` is told of every batch. A training that was broken off goes on
        from its last checkpoint; one that is complete is read back.
        """
        targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
        options = FinetuneOptions(
            rank=rank,
            alpha=alpha,
            target_modules=targets,
            learning_rate=learning_rate,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            grad_accumulation=grad_accumulation,
            max_length=max_length,
            window=window,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            clip=clip,
            dropout=dropout,
            seed=seed,
            base_bits=base_bits,
            init_from=None if init_from is None else Path(init_from),
            save_every=save_every,
            optimizer_states=optimizer_states,
        )
        task = self._task(data, Path(output), options, overwrite=overwrite)
        return self._trained(task, name, train(task, self._progress, observe, self._engine))

    @contextmanager
    def finetuning(
        self,
        data: str | Path | Iterable[Mapping[str, Any]],
        output: str | Path,
        options: FinetuneOptions | None = None,
        *,
        name: str | None = None,
        share: float = SHARE,
        overwrite: bool = False,
        observe: Callable[[Progress], None] | None = None,
    ) -> Iterator[Callable[[], TrainedAdapter]]:
        """Train an adapter while the block generates, on the same sweeps; leaving the block waits until it is whole.

        ``share``: the part of its time that generation may lose; the rest is as ``finetune`` has it. What the block
        gets returns the adapter, once it has been left. One training at a time.
        """
        if self._companion is not None:
            raise UsageError("finetuning: another training is under way: leave its block first")
        options = options or FinetuneOptions()
        if options.base_bits != self._options.weight_bits:
            raise UsageError(
                f"base_bits {options.base_bits}: training shares the weights, weight_bits {self._options.weight_bits}: "
                "give the same to both"
            )
        task = self._task(data, Path(output), options, overwrite=overwrite)
        found: list[TrainedAdapter] = []
        with closing(FinetuneJob(task)) as job:
            if job.completed is None:
                self._companion = Companion(job, parameters_of(task), observe or _unseen, share=share)
            try:
                yield lambda: found[0]
                if self._companion is not None:
                    if self._engine is None:  # nothing was generated
                        self._open_engine(Workload.uniform(self.window // 2, self.window // 4, 1))
                    self._share_engine()
                    self._companion.finish()
            except BaseException as error:
                if self._companion is not None:
                    self._companion.abandon(error)
                raise
            finally:
                self._companion = None
                if self._engine is not None:
                    self._engine.carry(None)
            found.append(self._trained(task, name, job.stats()))

    def stats(self) -> dict[str, Any]:
        """What the calls so far cost: the command line's ``--stats``, without its counts of rows.

        Counted anew where a call had no room beside the weights as they lay, and they were loaded again.
        """
        if self._engine is None:
            raise UsageError("stats: nothing has run yet: call generate or score first")
        return self._engine.stats()

    def _task(
        self, data: str | Path | Iterable[Mapping[str, Any]], output: Path, options: FinetuneOptions, *, overwrite: bool
    ) -> FinetuneTask:
        return FinetuneTask(
            folder=self._folder,
            fingerprint=weights_fingerprint(self._folder),
            codec=self._codec,
            data=read_training_rows(Path(data)) if isinstance(data, str | Path) else training_rows(data),
            output=output,
            options=options,
            engine=self._options,
            template=self._template,
            overwrite=overwrite,
        )

    def _trained(self, task: FinetuneTask, name: str | None, stats: Mapping[str, Any]) -> TrainedAdapter:
        trained = TrainedAdapter(name or task.output.absolute().name, task.output, stats)
        self._adapters[trained.name] = task.output
        if self._engine is not None:
            self._engine.put_adapter(trained.name, task.output)
        return trained

    def _open_engine(self, workload: Workload) -> Engine:
        companion = self._companion
        self._engine = Engine(
            self._folder,
            self._codec,
            self._options,
            workload,
            self._progress,
            adapters=self._adapters,
            passenger=None if companion is None else companion.trainer,
        )
        if companion is not None:
            companion.start()
        return self._engine

    def _share_engine(self) -> None:
        """Let a training begin that waits for an engine."""
        if self._companion is not None and self._engine is not None and not self._companion.is_started:
            self._engine.carry(self._companion.trainer)
            self._companion.start()

    def _tokenize(self, requests: Sequence[Request]) -> list[TokenizedRequest]:
        encoded = self._encoder.encode_all(requests)
        for index, tokens in enumerate(encoded):
            if isinstance(tokens, str):
                raise InputError(f"prompt {index}: {tokens}")
        return [
            TokenizedRequest(request, index, tokens)
            for index, (request, tokens) in enumerate(zip(requests, encoded, strict=True))
            if not isinstance(tokens, str)
        ]

    def _adapters_for(self, lora: Loras, count: int) -> list[str | None]:
        given = _for_each(lora, count, "lora")
        names: list[str | None] = [each.name if isinstance(each, TrainedAdapter) else each for each in given]
        unknown = next((name for name in names if name is not None and name not in self._adapters), None)
        if unknown is not None:
            raise UsageError(
                f"lora {unknown!r}: no adapter of that name: give it to LLM as lora={{{unknown!r}: folder}}"
            )
        return names

    def _run(self, requests: list[TokenizedRequest]) -> Iterator[tuple[int, Result]]:
        if not requests:
            return
        workload = Workload.of(requests, share_prefixes=self._options.share_prefixes)
        engine = self._engine
        if engine is not None and self._companion is None:
            try:
                engine.prepare(workload, whole=True)
            except DoesNotFitError:  # beside weights as they lie: they are dealt out again
                engine.close()
                engine = self._engine = None
        if engine is None:
            engine = self._open_engine(workload)
        self._share_engine()
        for result in engine.run(requests):
            yield int(result.id), result


def _unseen(progress: Progress) -> None:
    del progress


def _score(result: Result, start: int) -> Score:
    if result.error is not None or result.logprobs is None:
        reason = result.error.message if result.error is not None else "no log-probabilities"
        raise InputError(f"pair {result.id}: {reason}")
    values = [value for value in result.logprobs.token_logprobs[start:] if value is not None]
    tokens = result.logprobs.tokens[start:]
    greedy = all(
        next(iter(top)) == token for token, top in zip(tokens, result.logprobs.top_logprobs[start:], strict=True)
    )
    return Score(sum(values), greedy, tokens, tuple(values))


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    rows = list(prompts)
    if rows and isinstance(rows[0], int | Mapping):
        return [rows]  # type: ignore[list-item]
    return rows  # type: ignore[return-value]


def _for_each(values: Any, count: int, name: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise UsageError(f"{name}: {len(values)} values for {count} prompts: give one, or one each")
    return list(values)


def _request(index: int, prompt: Prompt, params: SamplingParams, lora: str | None) -> Request:
    if isinstance(prompt, str):
        return Request(str(index), params, prompt=prompt, lora=lora)
    values = list(prompt)
    if values and isinstance(values[0], Mapping):
        return Request(str(index), replace(params), messages=tuple(values), lora=lora)  # type: ignore[arg-type]
    return Request(str(index), params, prompt=tuple(values), lora=lora)  # type: ignore[arg-type]


def _size(value: int | str | None) -> int | None:
    return parse_size(value) if isinstance(value, str) else value


def _shares(value: Shares | str | None, name: str) -> Shares | None:
    return parse_shares(value, name) if isinstance(value, str) else value
