"""The HELM subset without HELM: problems solved anew from their text, prompts, scores, a job that is gone on with.

Where crfm-helm is installed, problems, prompts and metrics are compared with its own.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.helm_subset import batch, plain, report
from benchmarks.helm_subset.__main__ import main
from benchmarks.helm_subset.metrics import METRICS
from benchmarks.helm_subset.prompts import prompted, sampled, taken
from benchmarks.helm_subset.scenarios import SUBSET, by_name
from benchmarks.helm_subset.synthetic import Instance, natural_easy, pattern_match
from flexbatch.checkpoint.locate import ASSETS
from tests.evaluation import helm_facts, stand_ins

ROOT = Path(__file__).resolve().parents[2]
DEMO = ASSETS / "demo"
OWN = by_name("own")


@pytest.fixture(scope="module")
def patterns() -> list[Instance]:
    return pattern_match()


@pytest.fixture(scope="module")
def rules() -> list[Instance]:
    return natural_easy()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def splits(instances: list[Instance]) -> list[int]:
    return [sum(instance.split == split for instance in instances) for split in ("train", "valid", "test")]


def test_a_pattern_gives_its_result(patterns: list[Instance]) -> None:
    assert splits(patterns) == [1000, 5000, 5000]
    for instance in patterns[::7]:
        offered, result = instance.text.removeprefix("Rules: ").split(" | Result: ")
        assert instance.answer in offered.split(" | ")
        assert len(offered.split(" | ")) == 4
        letters: dict[str, int] = {}
        form = ""
        for part in instance.answer.split():
            if part not in "XYZ":
                form += re.escape(f"{part} ")
            elif part in letters:
                form += f"\\{letters[part]} "
            else:
                letters[part] = len(letters) + 1
                form += r"([a-z]+(?: [a-z]+)?) "
        assert re.fullmatch(form, f"{result} "), instance


def test_what_follows_from_rules_is_the_answer(rules: list[Instance]) -> None:
    assert splits(rules) == [1000, 5000, 5000]
    nothing = 0
    for instance in rules[::5]:
        *lines, _, fact, last = instance.text.split("\n")
        known = set(fact.rstrip(".").split(" is ")[1].split(" and "))
        follows = []
        for line in lines:
            found = re.fullmatch(r"If (.+) is (.+), then (.+) is (.+)\.", line)
            assert found is not None
            wanted = set(re.split(" and | or ", found[2]))
            if (wanted & known if " or " in found[2] else wanted <= known) and found[4] not in known:
                follows.append(found[4])
        subject = fact.split(" is ")[0]
        assert instance.answer == (f"{subject} is {' and '.join(follows)}." if follows else "Nothing.")
        assert last.lower() == f"the following can be determined about {subject.lower()}:"
        nothing += not follows
    assert 0 < nothing < 500


@pytest.mark.parametrize("window", [90, 130, 200, 4000])
def test_prompts_fit_the_window(rules: list[Instance], tokenizer: Any, window: int) -> None:
    style = OWN[1].style
    assert style is not None
    examples = sampled(rules, style.examples)
    assert len({example.answer for example in examples}) == len(examples) == 3
    made = prompted(rules, style, tokenizer, window, 12)
    assert [one.number for one in made] == taken(rules, 12)
    assert all(one.number >= 1000 and one.instance is rules[one.number] for one in made)
    for one in made:
        assert len(tokenizer.encode(one.prompt, add_special_tokens=False)) + style.max_tokens <= window
        if window == 4000:
            blocks = [f"Rules:\n{example.text}\n{example.answer}\n" for example in examples]
            question = f"Rules:\n{one.instance.text}\n"
            assert one.prompt == "\n".join(["Please solve the following problem.\n", *blocks, question])


def test_metrics_by_hand() -> None:
    assert METRICS["f1_set_match"]("The cow is red and big.", "The cow is big.") == pytest.approx(2 / 3)
    assert METRICS["iou_set_match"]("The cow is red and big.", "The cow is big and old.\nRules") == pytest.approx(1 / 3)
    assert METRICS["exact_set_match"]("The cow is red and big.", "The cow is big and red.") == 1
    assert METRICS["f1_set_match"]("Nothing.", "Nothing.") == 1
    assert METRICS["f1_set_match"]("Nothing.", "The cow is red.") == 0
    assert METRICS["exact_match"]("X + Y ", "X + Y") == 1
    assert METRICS["exact_match"]("", "") == 0
    assert METRICS["quasi_exact_match"]("The Cow!", "cow") == 1
    assert METRICS["prefix_exact_match"]("X + Y", "X + Y = X") == 1
    assert METRICS["quasi_prefix_exact_match"]("A Cow.", "cow, big") == 1


def test_everything_with_one_command_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["all", "--model", "demo", "-o", str(tmp_path), "--instances", "5", "--no-plan", "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(scenario.name in printed for scenario in OWN)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [one["instances"] for one in found] == [5, 5]
    outputs = [(tmp_path / f"{scenario.name}.out.jsonl").read_bytes() for scenario in OWN]
    for scenario, one in zip(OWN, found, strict=True):
        rows = [json.loads(line) for line in (tmp_path / f"{scenario.name}.out.jsonl").read_text().splitlines()]
        assert one["tokens"] == sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
        assert plain.score(scenario, tmp_path)["metrics"] == one["metrics"]
    # The second scenario is lost, as if killed before it; the first one is not run again.
    (tmp_path / f"{OWN[1].name}.out.jsonl").unlink()
    before = (tmp_path / f"{OWN[0].name}.out.jsonl").stat().st_mtime_ns
    assert main(command) == 0
    assert [(tmp_path / f"{scenario.name}.out.jsonl").read_bytes() for scenario in OWN] == outputs
    assert (tmp_path / f"{OWN[0].name}.out.jsonl").stat().st_mtime_ns == before
    assert main(["score", *command[1:]]) == 0


def killed(command: list[str], journals: list[Path], more: int) -> int:
    """Start the program, kill it outright when a journal has ``more`` rows, and return how many rows there are."""

    def rows() -> int:
        found = [path.read_bytes().count(b"\n") - 1 for path in journals if path.exists()]
        return max([0, *found])

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "benchmarks.helm_subset", *command]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
        while rows() < more and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return rows()


def test_killed_outright_and_given_again(tmp_path: Path) -> None:
    """Killed in the second scenario: the first is not run again, and of the second only what was not done."""
    command = ["all", "--model", "demo", "--instances", "40", "--no-plan", "--device", "cpu", "--max-sequences", "2"]
    assert main([*command, "-o", str(tmp_path / "whole")]) == 0
    place = tmp_path / "killed"
    command += ["-o", str(place)]
    done = killed(command, [place / f"{OWN[1].name}.out.jsonl.part"], 4)
    assert 4 <= done < 40
    assert not (place / "report.json").exists()
    before = (place / f"{OWN[0].name}.out.jsonl").stat().st_mtime_ns
    assert main(command) == 0
    assert (place / f"{OWN[0].name}.out.jsonl").stat().st_mtime_ns == before
    stats = json.loads((place / f"{OWN[1].name}.stats.json").read_text(encoding="utf-8"))
    assert (stats["resumed"], stats["completed"]) == (done, 40)
    found = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "whole", place)]
    assert found[1][1]["resumed"] == done
    for whole, again in zip(*found, strict=True):
        assert (again["metrics"], again["tokens"]) == (whole["metrics"], whole["tokens"])
    assert "+: goes on an earlier run" in (place / "report.txt").read_text(encoding="utf-8")


def test_the_report_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must be downloaded"):
        main(["all", "--model", "demo", "-o", str(tmp_path), "--scenarios", "mmlu_abstract_algebra"])
    with pytest.raises(SystemExit, match="no such scenario"):
        by_name("mmlu")
    assert len(SUBSET) == 7
    assert sum(scenario.minutes for scenario in SUBSET) == 1249
    minutes = report.planned_minutes(SUBSET[1], "opt-30b", ["--profile", "t4"])
    assert 1 < minutes < 1000


@pytest.mark.parametrize("case", json.loads(helm_facts.STORED.read_text(encoding="utf-8"))["cases"])
def test_prompts_and_metrics_are_those_that_helm_made(case: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """``prepare`` and ``score`` against what is stored of crfm-helm 0.5.16, whose run specs made it all."""
    (scenario,) = by_name(case["scenario"])
    rows = plain.prepare(scenario, tmp_path, tokenizer, case["window"], case["instances"])
    prompts = [(int(row["id"].removeprefix("id")), row["prompt"]) for row in rows]
    assert helm_facts.hashed(prompts) == case["prompts"]
    gold = batch.read_rows(tmp_path / f"{scenario.name}.gold.jsonl")
    results = [
        {
            "id": row["id"],
            "text": helm_facts.answered(row["answer"], int(row["id"].removeprefix("id"))),
            "prompt_tokens": 1,
            "completion_tokens": 1,
        }
        for row in gold
    ]
    batch.write_rows(tmp_path / f"{scenario.name}.out.jsonl", results)
    found = plain.score(scenario, tmp_path)["splits"]
    assert found.keys() == case["splits"].keys()
    for split, expected in case["splits"].items():
        assert found[split] == pytest.approx(expected, abs=1e-8)


# --- against HELM's own, where it is installed ---------------------------------------------------------------------


def helm(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"helm.benchmark.{module}", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "make", "ours"),
    [
        ("synthetic_reasoning_scenario", lambda m: m.SyntheticReasoningScenario("pattern_match"), pattern_match),
        ("synthetic_reasoning_natural_scenario", lambda m: m.SRNScenario("easy"), natural_easy),
    ],
)
def test_problems_and_prompts_equal_those_of_helm(
    module: str, make: Callable[[Any], Any], ours: Callable[[], list[Instance]], tmp_path: Path
) -> None:
    theirs = make(helm(f"scenarios.{module}")).get_instances(str(tmp_path))
    own = ours()
    assert [(one.text, one.answer, one.split) for one in own] == [
        (one.input.text, one.references[0].output.text, one.split) for one in theirs
    ]


@pytest.mark.filterwarnings("ignore")
def test_metrics_equal_those_of_helm() -> None:
    module = helm("metrics.evaluate_reference_metrics")
    draw = random.Random(0)
    parts = ["The cow", " is ", "red", " and ", "big", ".", "\n", "Nothing.", " the ", "a ", "X + Y", "!"]
    for _ in range(3000):
        gold, answer = ("".join(draw.choices(parts, k=draw.randint(1, 6))) for _ in range(2))
        if draw.random() < 0.3:
            answer = gold + draw.choice(["", " ", ".", " x"])
        answer = answer.strip()
        for name, metric in METRICS.items():
            assert metric(gold, answer) == pytest.approx(getattr(module, name)(gold, answer)), (name, gold, answer)


@pytest.mark.filterwarnings("ignore")
def test_stored_facts_are_those_of_the_helm_that_is_here(tmp_path: Path) -> None:
    helm("runner")
    assert helm_facts.facts(tmp_path) == json.loads(helm_facts.STORED.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore")
def test_helm_is_killed_outright_and_given_again(tmp_path: Path) -> None:
    """HELM asks for the batch that was killed once more, and gets what is done from its journal."""
    helm("runner")
    command = ["run", "--model", "demo", "--instances", "25", "--no-plan", "--device", "cpu", "--max-sequences", "2"]
    command += ["--scenarios", OWN[1].name, "-o"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    place = tmp_path / "killed"
    done = killed([*command, str(place)], [place / "batches" / f"{OWN[1].name}.out.jsonl.part"], 4)
    assert main([*command, str(place)]) == 0
    found = [json.loads((folder / "report.json").read_text())[0] for folder in (tmp_path / "whole", place)]
    assert [one["resumed"] for one in found] == [0, done]
    compared = ("instances", "tokens", "metrics")
    for name in compared:
        left, right = ({**one[name], "inference_runtime": 0} if name == "metrics" else one[name] for one in found)
        assert left == (pytest.approx(right, rel=1e-5) if name == "metrics" else right)  # sweeps were cut differently
    # What is complete is not run a third time.
    before = (place / "batches" / f"{OWN[1].name}.out.jsonl").stat().st_mtime_ns
    assert main([*command, str(place)]) == 0
    assert (place / "batches" / f"{OWN[1].name}.out.jsonl").stat().st_mtime_ns == before


@pytest.mark.filterwarnings("ignore")
def test_the_whole_subset_runs_once_its_data_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All seven through HELM; one whose metrics need a module that is not here is named, and the others go on."""
    helm("runner")
    stand_ins.write(tmp_path)
    code = main(["run", "--model", "demo", "-o", str(tmp_path), "--instances", "6", "--no-plan", "--device", "cpu"])
    found = {one["scenario"]: one for one in json.loads((tmp_path / "report.json").read_text())}
    lacking = [scenario.name for scenario in SUBSET if scenario.name not in found]
    assert lacking in ([], ["summarization_xsum_sampled"])
    assert code == (3 if lacking else 0)
    if lacking:
        assert "summarization_xsum_sampled: HELM " in capsys.readouterr().err
    for scenario in SUBSET:
        batch = tmp_path / "batches" / f"{scenario.name}.out.jsonl"
        assert batch.read_bytes().count(b"\n") == 6 * scenario.outputs
        if scenario.name in found:
            assert scenario.metric in found[scenario.name]["metrics"]
