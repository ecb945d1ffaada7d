"""HELM runs a scenario and computes its metrics; flexbatch answers all of its requests as one batch.

The only module here that imports HELM (crfm-helm 0.5). With ``baseline`` HELM's own Hugging Face client answers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.config_registry import register_builtin_configs_from_helm_package
from helm.benchmark.executor import ExecutionSpec, Executor
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.benchmark.model_metadata_registry import get_unknown_model_metadata, register_model_metadata
from helm.benchmark.presentation.run_entry import RunEntry
from helm.benchmark.run import run_entries_to_run_specs
from helm.benchmark.runner import Runner, set_benchmark_output_path
from helm.benchmark.tokenizer_config_registry import TokenizerConfig, TokenizerSpec, register_tokenizer_config
from helm.common.authentication import Authentication
from helm.common.request import GeneratedOutput, Request, RequestResult, Token

from benchmarks.helm_subset.batch import Answers, Row, answer
from benchmarks.helm_subset.scenarios import SubScenario
from flexbatch import LLM


class NotRunError(Exception):
    """HELM lacks what a scenario needs: a data set, or a module or model of its metrics."""


class FlexbatchExecutor(Executor):  # type: ignore[misc]  # HELM has no types
    """Hands a whole scenario state to ``flexbatch run``; files go below ``folder``."""

    def __init__(self, spec: Any, llm: LLM, model: str, folder: Path, options: Sequence[str]) -> None:
        super().__init__(spec)
        self._tokenizer = llm.tokenizer
        self._model = model
        self._folder = folder
        self._options = options
        self.name = ""
        self.answers: Answers | None = None

    def execute(self, scenario_state: Any) -> Any:
        """Fill in the results of all requests."""
        states = scenario_state.request_states
        rows = [row for number, state in enumerate(states) for row in rows_of(state.request, number)]
        self.answers = answer(rows, self._folder / self.name, self._model, self._options)
        done = [
            replace(state, result=self._result(state.request, number, self.answers))
            for number, state in enumerate(states)
        ]
        return ScenarioState(
            adapter_spec=scenario_state.adapter_spec,
            request_states=done,
            annotator_specs=scenario_state.annotator_specs,
        )

    def _result(self, request: Any, number: int, answers: Answers) -> Any:
        completions = [
            self._completion(request, answers.results[f"{number}-{copy}"]) for copy in range(request.num_completions)
        ]
        return RequestResult(success=True, embedding=[], completions=completions, cached=False, request_time=0.0)

    def _completion(self, request: Any, row: Row) -> Any:
        """A row as HELM has it: tokens with their log-probabilities, up to where the text ends."""
        decode = self._tokenizer.decode
        ids = row["logprobs"]["tokens"]
        values = [value or 0.0 for value in row["logprobs"]["token_logprobs"]]
        text = row["text"]
        own = len(row["token_ids"])
        before = ids[: len(ids) - own]
        kept = list(row["token_ids"])
        while kept and len(decode(kept[:-1], skip_special_tokens=True)) >= len(text):
            kept.pop()
        count = len(before) + len(kept)
        tokens = [Token(text=decode([token]), logprob=value) for token, value in zip(ids[:count], values, strict=False)]
        ended = own > 0 and row["finish_reason"] == "stop" and row["token_ids"][-1] == self._tokenizer.eos_token_id
        return GeneratedOutput(
            text=(request.prompt + text) if request.echo_prompt else text,
            logprob=sum(values[:count]),
            tokens=tokens,
            finish_reason={"reason": "endoftext" if ended else row["finish_reason"]},
        )


def rows_of(request: Any, number: int) -> list[Row]:
    """A HELM request as rows, one for each completion. A row's sample depends on its prompt and ``random`` alone."""
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(request, name):
            raise SystemExit(f"{name}: HELM asks for it, and flexbatch has none: leave this scenario out")
    asked = {"messages": request.messages} if request.messages else {"prompt": request.prompt}
    return [
        {
            "id": f"{number}-{copy}",
            **asked,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stop": list(request.stop_sequences),
            "echo": request.echo_prompt,
            "seed": _seed(request, copy),
        }
        for copy in range(request.num_completions)
    ]


def _seed(request: Request, copy: int) -> int:
    text = json.dumps([request.random, copy, request.prompt, request.messages])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


class Helm:
    """HELM with one model, its files below ``folder``; ``most`` instances of each scenario are answered."""

    def __init__(
        self,
        model: str,
        folder: Path,
        options: Sequence[str],
        most: int | None,
        *,
        chat: bool = False,
        baseline: bool = False,
    ) -> None:
        self._folder = folder
        self._most = most
        self._baseline = baseline
        self._suite = "baseline" if baseline else "flexbatch"
        llm = LLM(model)
        self._name = f"flexbatch/{Path(model).name}"
        register_builtin_configs_from_helm_package()
        _register(self._name, llm, chat=chat)
        set_benchmark_output_path(str(folder))
        spec = ExecutionSpec(
            url=None, auth=Authentication(""), local_path=str(folder / "prod_env"), parallelism=1, dry_run=False
        )
        self._runner = Runner(
            spec,
            str(folder),
            self._suite,
            skip_instances=False,
            cache_instances=False,
            cache_instances_only=False,
            skip_completed_runs=True,
            exit_on_error=True,
        )
        chats = ["--chat"] if chat else []
        self._executor = FlexbatchExecutor(spec, llm, model, folder / "batches", [*options, *chats])
        if not baseline:
            self._runner.executor = self._executor

    def run(self, scenario: SubScenario) -> dict[str, Any]:
        """Run one scenario, unless its results are there, and return what the report needs of it.

        Raises NotRunError, saying what to install or which file belongs where, if HELM cannot get what it needs.
        """
        entry = RunEntry(f"{scenario.entry},model={self._name}", 1, None)
        (spec,) = run_entries_to_run_specs([entry], max_eval_instances=self._most)
        self._executor.name = scenario.name
        started = time.perf_counter()
        try:
            self._runner.run_one(spec)
        except ModuleNotFoundError as error:
            extra = "summarization" if scenario.name.startswith("summarization") else "scenarios,metrics"
            raise NotRunError(
                f"{scenario.name}: HELM needs the module {error.name} for it: pip install 'crfm-helm[{extra}]', "
                "and run again; what is answered is kept"
            ) from error
        except (URLError, OSError) as error:
            missing = [each for each in scenario.data if not (self._folder / each.place).exists()]
            if not missing:
                reason = " ".join(str(error).split())[:300]
                raise NotRunError(
                    f"{scenario.name}: HELM could not run or score it ({reason}): mend that and run again; "
                    "what is answered is kept"
                ) from error
            places = "; ".join(
                f"put {each.url}{', unpacked,' if each.unpack else ''} at {self._folder / each.place}"
                for each in missing
            )
            raise NotRunError(f"{scenario.name}: HELM cannot download its data ({error}): {places}") from error
        seconds = time.perf_counter() - started
        return self._summary(scenario, self._folder / "runs" / self._suite / spec.name, seconds)

    def _summary(self, scenario: SubScenario, place: Path, seconds: float) -> dict[str, Any]:
        stats = json.loads((place / "stats.json").read_text(encoding="utf-8"))
        means: dict[str, dict[str, float]] = {}
        counts: dict[str, float] = {}
        for stat in stats:
            name, split = stat["name"]["name"], stat["name"].get("split")
            if split is None or "perturbation" in stat["name"] or "mean" not in stat:
                continue
            means.setdefault(split, {})[name] = stat["mean"]
            if name == "num_instances":
                counts[split] = counts.get(split, 0) + stat["mean"]
        total = sum(counts.values())
        names = {name for found in means.values() for name in found}
        whole = {
            name: sum(means[split][name] * counts[split] for split in counts if name in means[split]) / max(1, total)
            for name in sorted(names)
        }
        summary_path = place / "flexbatch.json"
        answers = self._executor.answers
        self._executor.answers = None
        if answers is None and summary_path.exists():
            cost = json.loads(summary_path.read_text(encoding="utf-8"))
        else:
            tokens = answers.tokens if answers is not None else 0
            minutes = answers.minutes if answers is not None else seconds / 60
            cost = {"tokens": tokens, "minutes": minutes, "resumed": answers.resumed if answers is not None else 0}
            summary_path.write_text(json.dumps(cost), encoding="utf-8")
        return {"scenario": scenario.name, "instances": int(total), **cost, "metrics": whole, "splits": means}


def _register(name: str, llm: LLM, *, chat: bool) -> None:
    """Tell HELM of the model: its window and its tokenizer. HELM's own client is named for the baseline."""
    place = {"pretrained_model_name_or_path": llm.tokenizer.name_or_path}
    register_model_metadata(get_unknown_model_metadata(name))
    register_model_deployment(
        ModelDeployment(
            name=name,
            model_name=name,
            tokenizer_name=name,
            max_sequence_length=llm.window,
            client_spec=ClientSpec(
                class_name="helm.clients.huggingface_client.HuggingFaceClient",
                args={**place, "apply_chat_template": chat, "torch_dtype": "torch.float32"},
            ),
        )
    )
    register_tokenizer_config(
        TokenizerConfig(
            name=name,
            tokenizer_spec=TokenizerSpec(
                class_name="helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer", args=place
            ),
            end_of_text_token=llm.tokenizer.eos_token or "",
            prefix_token=llm.tokenizer.bos_token or "",
        )
    )
