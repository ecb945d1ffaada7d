"""A model without weights: characters are tokens, and a row's answer is its prompt reversed.

The engine finishes rows last first, so that order is put right by the job and not by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from flexbatch.checkpoint.locate import ModelFolder
from flexbatch.cli.backend import Backend, LoadProgress
from flexbatch.errors import ModelError
from flexbatch.finetune.job import FinetuneTask, Sizes
from flexbatch.finetune.optimizer import NamedTensors
from flexbatch.options import EngineOptions
from flexbatch.requests import Result, RowError, TokenizedRequest, TokenLogprobs
from flexbatch.runtime.passenger import Passenger
from flexbatch.shapes import ModelShape
from flexbatch.text.codec import TextCodec
from tests.finetune.fakes import FakeParameters, FakeTrainer

VOCABULARY, WINDOW = 0x3000, 60


class FakeCodec:
    """One token a character."""

    has_template = True

    eos_token_id = 2

    def encode_many(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[tuple[int, ...]]:
        return [tuple(map(ord, text)) for text in texts]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], template: str | None = None) -> tuple[int, ...]:
        if not self.has_template and template is None:
            raise ModelError("fake has no chat template: give one with --chat-template FILE")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return tuple(map(ord, (template or "") + text))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def token_text(self, token: int) -> str:
        return chr(token)


@dataclass
class Progress:
    prompt_tokens: int = 0
    completion_tokens: int = 0


class FakePlan:
    def __init__(self, options: EngineOptions) -> None:
        self._options = options

    def to_json(self) -> dict[str, Any]:
        shares = {"gpu": 0.0, "cpu": 1.0, "disk": 0.0}
        return {
            "weights": shares,
            "kv": shares,
            "hidden": shares,
            "max_sequences": 4,
            "micro_batch_tokens": 16,
            "dtype": "float32" if self._options.dtype == "auto" else self._options.dtype,
            "weight_bits": self._options.weight_bits or 4,
            "kv_bits": self._options.kv_bits or 4,
        }


class FakeEngine:
    def __init__(self, options: EngineOptions, backend: FakeBackend) -> None:
        self.plan = FakePlan(options)
        self._backend = backend
        self._progress = Progress()

    def run(self, requests: Sequence[TokenizedRequest]) -> Iterator[Result]:
        for count, request in enumerate(reversed(requests)):
            if self._backend.before is not None:
                self._backend.before(count)
            self._backend.computed.append(request.request.id)
            result = answer(request)
            self._progress.prompt_tokens += result.prompt_tokens
            self._progress.completion_tokens += result.completion_tokens
            yield result
        if self._backend.before is not None:
            self._backend.before(len(requests))

    def snapshot(self) -> Progress:
        return self._progress

    def stats(self) -> dict[str, Any]:
        return {"completion_tokens": self._progress.completion_tokens, "throughput_tok_s": 1.0, "plan": {}}

    def write_trace(self, path: Path) -> None:
        path.write_text("[]")

    def close(self) -> None:
        self._backend.closed += 1


@dataclass
class FakeBackend(Backend):
    """``before(n)`` is called when n rows are finished; ``computed`` lists the rows that were run."""

    before: Callable[[int], None] | None = None
    tokenizer: FakeCodec | None = field(default_factory=FakeCodec)
    model_hash: str = "m1"
    warnings: tuple[str, ...] = ()
    computed: list[str] = field(default_factory=list)
    options: list[EngineOptions] = field(default_factory=list)
    adapters: list[dict[str, Path]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    closed: int = 0
    before_batch: Callable[[int], None] | None = None
    bad: tuple[str, int] | None = None
    trainers: list[FakeTrainer] = field(default_factory=list)
    sizes: list[Sizes] = field(default_factory=list)

    def locate(self, model: str, *, dummy: bool) -> ModelFolder:
        return ModelFolder(model, Path("/nowhere"), {}, shape(), self.warnings, dummy)

    def fingerprint(self, folder: ModelFolder) -> str:
        return self.model_hash

    def codec(self, folder: ModelFolder) -> TextCodec | None:
        return cast("TextCodec | None", self.tokenizer)

    def refused_adapters(self, folder: ModelFolder, adapters: Mapping[str, Path]) -> dict[str, str]:
        return {name: reason for name, reason in self.refused.items() if name in adapters}

    def parameters(self, task: FinetuneTask) -> FakeParameters:
        return FakeParameters()

    def trainer(
        self, task: FinetuneTask, parameters: NamedTensors, sizes: Sizes, progress: LoadProgress
    ) -> FakeTrainer:
        assert isinstance(parameters, FakeParameters)
        progress("loading weights", 1, 1)
        self.sizes.append(sizes)
        self.trainers.append(FakeTrainer(parameters, self.before_batch, self.bad))
        return self.trainers[-1]

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
    ) -> FakeEngine:
        self.adapters.append(dict(adapters))
        self.options.append(options)
        progress("loading weights", 1, 1)
        return FakeEngine(options, self)


def answer(request: TokenizedRequest) -> Result:
    """The prompt reversed; a prompt that begins with an exclamation mark fails."""
    row, params = request.request, request.request.params
    if request.token_ids[0] == ord("!"):
        error = RowError("does_not_fit", "too long for the cpu tier")
        return Result(row.id, "", (), "error", len(request.token_ids), 0, error=error)
    tokens = request.token_ids[::-1][: params.max_tokens]
    logprobs = None
    if params.logprobs is not None:
        logprobs = TokenLogprobs(tokens, (-1.0,) * len(tokens), ({},) * len(tokens))
    text = "".join(map(chr, tokens))
    return Result(row.id, text, tokens, "length", len(request.token_ids), len(tokens), logprobs, lora=row.lora)


def shape() -> ModelShape:
    return ModelShape(
        family="llama",
        architecture="LlamaForCausalLM",
        num_layers=1,
        hidden_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        vocab_size=VOCABULARY,
        max_positions=WINDOW,
        stored_dtype="float16",
        tie_embeddings=True,
        activation="silu",
        norm_eps=1e-5,
        attention_scale=1.0,
        windows=(None,),
        eos_token_ids=(2,),
    )
