"""What crfm-helm makes of the scenarios that need no download: its prompts, hashed, and its metrics of given answers.

``python -m tests.evaluation.helm_facts FILE`` writes them with the crfm-helm that is installed, through its own run
specs, adapter, tokenizer, window service and metrics; ``helm_facts.json`` are those of 0.5.16.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.helm_subset.scenarios import SubScenario, by_name
from flexbatch.checkpoint.locate import ASSETS

STORED = Path(__file__).with_name("helm_facts.json")
CASES = ((256, 40), (700, 40), (2048, 60))
"""Windows, in tokens of the demo model, and instances: prompts lose most, some and none of their examples."""


def answered(gold: str, number: int) -> str:
    """A made-up answer to instance ``number``: right, nearly right, or wrong."""
    words = gold.split()
    ways = (gold, f"{gold} or so", gold.upper(), " ".join(words[: len(words) // 2]), "", "Nothing.", f" {gold}\nRules:")
    return ways[number % len(ways)]


def hashed(prompts: Sequence[tuple[int, str]]) -> str:
    """A short hash of numbered prompts."""
    return hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Model:
    """As much of a model as HELM is told of it."""

    tokenizer: Any
    window: int


def facts(folder: Path) -> dict[str, Any]:
    """HELM's prompts and metrics of every case; its files go below ``folder``."""
    from helm.benchmark.adaptation.scenario_state import ScenarioState
    from helm.benchmark.executor import Executor
    from helm.common.request import GeneratedOutput, RequestResult

    from benchmarks.helm_subset import through_helm

    class Answering(Executor):  # type: ignore[misc]  # HELM has no types
        """Keeps the prompts, and answers without a model."""

        prompts: list[tuple[int, str]]

        def execute(self, scenario_state: Any) -> Any:
            states = scenario_state.request_states
            self.prompts = [(int(state.instance.id.removeprefix("id")), state.request.prompt) for state in states]
            done = []
            for state, (number, _) in zip(states, self.prompts, strict=True):
                text = answered(state.instance.references[0].output.text, number)
                output = GeneratedOutput(text=text, logprob=0.0, tokens=[])
                result = RequestResult(success=True, embedding=[], completions=[output], cached=False, request_time=0.0)
                done.append(replace(state, result=result))
            return ScenarioState(scenario_state.adapter_spec, done, scenario_state.annotator_specs)

    found: dict[str, Any] = {"crfm-helm": version("crfm-helm"), "cases": []}
    for window, most in CASES:
        model = _Model(AutoTokenizer.from_pretrained(ASSETS / "demo"), window)
        place = folder / str(window)
        place.mkdir(parents=True)
        helm = through_helm.Helm("demo", place, [], most)
        through_helm._register(helm._name, model, chat=False)  # type: ignore[arg-type]
        executor = helm._runner.executor = Answering(helm._runner.executor.execution_spec)
        for scenario in by_name("own"):
            found["cases"].append(_case(scenario, window, most, helm.run(scenario), executor.prompts))
    return found


def _case(
    scenario: SubScenario, window: int, most: int, summary: dict[str, Any], prompts: list[tuple[int, str]]
) -> dict[str, Any]:
    return {
        "scenario": scenario.name,
        "window": window,
        "instances": most,
        "prompts": hashed(prompts),
        "splits": {
            split: {name: round(means[name], 9) for name in scenario.metrics}
            for split, means in sorted(summary["splits"].items())
        },
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        Path(sys.argv[1]).write_text(json.dumps(facts(Path(made)), indent=1) + "\n", encoding="utf-8")
