"""The HELM subset of FlexGen's table, with flexbatch: ``python -m benchmarks.helm_subset all --model demo -o DIR``.

``all`` does everything for the scenarios that need no download, without HELM; ``run`` has HELM run and score any of
the seven. ``prepare`` and ``score`` are the halves of ``all``, with ``flexbatch run`` between them. Killed and given
again, each goes on. Options that are not listed here go to ``flexbatch run``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.helm_subset import plain, report
from benchmarks.helm_subset.batch import BatchFailedError, answer
from benchmarks.helm_subset.scenarios import SubScenario, by_name
from flexbatch import LLM


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.helm_subset", description=__doc__)
    top.add_argument("command", choices=("all", "run", "prepare", "score", "report"))
    top.add_argument("--model", required=True, help="what flexbatch run takes")
    top.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="everything goes there")
    top.add_argument("--scenarios", help="all, own (need no download), or names separated by commas")
    top.add_argument("--instances", type=int, default=100, metavar="N", help="of each scenario; 0: all (default 100)")
    top.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
    top.add_argument("--baseline", action="store_true", help="run: let HELM's own Hugging Face client answer")
    top.add_argument("--plan-model", default="opt-30b", metavar="M", help="the report's estimate (default opt-30b)")
    top.add_argument("--plan-profile", metavar="NAME", help="on which machine: see flexbatch plan (default: this one)")
    top.add_argument("--no-plan", action="store_true", help="leave the estimate out")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 3 if a scenario could not be run."""
    values, others = parser().parse_known_args(arguments)
    scenarios = by_name(values.scenarios or ("all" if values.command == "run" else "own"))
    most = values.instances or None
    missing = [each.name for each in scenarios if each.style is None]
    if missing and values.command != "run":
        raise SystemExit(f"--scenarios {missing[0]}: its data must be downloaded, which HELM does: use run")
    values.output.mkdir(parents=True, exist_ok=True)
    if values.command == "report":
        found = json.loads((values.output / "report.json").read_text(encoding="utf-8"))
        return _report(found, scenarios, values)
    if values.command == "run":
        found, failed = _through_helm(scenarios, values, most, others)
    else:
        found, failed = _plain(scenarios, values, most, others)
    if values.command == "prepare":
        return 0
    (values.output / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in failed:
        print(line, file=sys.stderr)
    _report(found, scenarios, values)
    return 3 if failed else 0


def _plain(
    scenarios: Sequence[SubScenario], values: argparse.Namespace, most: int | None, others: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    found: list[dict[str, Any]] = []
    if values.command != "score":
        llm = LLM(values.model)  # its tokenizer alone: no weights are read
    for scenario in scenarios:
        if values.command != "score":
            rows = plain.prepare(scenario, values.output, llm.tokenizer, llm.window, most)
        if values.command == "all":
            chat = ["--chat"] if values.chat else []
            answer(rows, values.output / scenario.name, values.model, [*chat, *others])
        if values.command != "prepare":
            found.append(plain.score(scenario, values.output))
    return found, []


def _through_helm(
    scenarios: Sequence[SubScenario], values: argparse.Namespace, most: int | None, others: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        from benchmarks.helm_subset.through_helm import Helm, NotRunError
    except ImportError as error:
        raise SystemExit(f"run needs HELM ({error}): pip install 'flexbatch[helm]', or use all") from None
    helm = Helm(values.model, values.output, others, most, chat=values.chat, baseline=values.baseline)
    found: list[dict[str, Any]] = []
    failed: list[str] = []
    for scenario in scenarios:
        try:
            found.append(helm.run(scenario))
        except NotRunError as error:
            failed.append(str(error))
    return found, failed


def _report(found: list[dict[str, Any]], scenarios: Sequence[SubScenario], values: argparse.Namespace) -> int:
    profile = [] if values.plan_profile is None else ["--profile", values.plan_profile]
    plans = (
        {}
        if values.no_plan
        else {each.name: report.planned_minutes(each, values.plan_model, profile) for each in scenarios}
    )
    text = report.table(found, plans, values.plan_model)
    (values.output / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    drawn = report.draw(values.output / "report.svg", found, f"HELM subset, {Path(values.model).name}")
    if not drawn:
        print("report.svg was not drawn: matplotlib is not installed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BatchFailedError as error:
        sys.exit(error.code)
