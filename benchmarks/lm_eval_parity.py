"""Whether lm-evaluation-harness scores alike with flexbatch and with its Hugging Face backend, and how fast each is.

Makes tasks of every kind from benchmarks/prompts.txt, evaluates them with both in fp32, and compares instance by
instance: log-likelihoods, is_greedy, generations. Generations may differ at near ties only, which are counted.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from flexbatch import LLM
from flexbatch.evaluation.lm_eval_model import FlexbatchLM

TEXT = Path(__file__).parent / "prompts.txt"
WINDOW = 512
Task = dict[str, Any]


def sentences() -> list[str]:
    """Sentences of a few words or more, in order."""
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    return [part for part in re.split(r"(?<=[.!?]) ", text) if 40 < len(part) < 300]


def tasks(rows: int, draw: random.Random) -> dict[str, tuple[Task, list[dict[str, Any]]]]:
    """Name -> (settings of the task, its documents)."""
    lines = sentences()
    choices, last_words, texts, endings, questions, sums = [], [], [], [], [], []
    for _ in range(rows):
        at = draw.randrange(len(lines) - 4)
        words = lines[at + 1].split()
        middle = len(words) // 2
        context = f"{lines[at]} {' '.join(words[:middle])}"
        wrong = [" ".join(line.split()[-(len(words) - middle) :]) for line in draw.sample(lines, 3)]
        options = [" ".join(words[middle:]), *wrong]
        draw.shuffle(options)
        choices.append({"context": context, "options": options, "answer": options.index(" ".join(words[middle:]))})
        last_words.append({"context": " ".join(words[:-1]), "target": f" {words[-1]}"})
        endings.append({"context": context})
        person = draw.choice(["Emma", "Mr. Knightley", "Miss Taylor", "Mr. Woodhouse"])
        questions.append({"question": f"Who is {person}, and what is said here? {lines[at]}"})
        left, right = draw.randint(1, 4), draw.randint(1, 4)
        sums.append({"left": left, "right": right, "answer": left + right - 2})
    for _ in range(max(2, rows // 4)):
        at = draw.randrange(len(lines) // 2)
        texts.append({"text": " ".join(lines[at : at + draw.choice([3, 12, 40])])})
    until = ["\n\n", ". ", "Emma", " and the"]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    return {
        "cloze_choice": (
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{context}}",
                "doc_to_choice": "options",
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            },
            choices,
        ),
        "sum_choice": (
            {
                "output_type": "multiple_choice",
                "num_fewshot": 5,
                "fewshot_split": "test",
                "doc_to_text": "{{left}} + {{right}} =",
                "doc_to_choice": ["2", "3", "4", "5", "6", "7", "8"],
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc"}],
            },
            sums,
        ),
        "last_word": (
            {
                "output_type": "loglikelihood",
                "doc_to_text": "{{context}}",
                "doc_to_target": "{{target}}",
                "target_delimiter": "",
                "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
            },
            last_words,
        ),
        "passages": (
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
            },
            texts,
        ),
        "endings": (
            {
                "output_type": "generate_until",
                "doc_to_text": "{{context}}",
                "doc_to_target": "",
                "generation_kwargs": {"until": until, "max_gen_toks": 48, "do_sample": False},
                "metric_list": exact,
            },
            endings,
        ),
        "answers_chat": (
            {
                "output_type": "generate_until",
                "doc_to_text": "{{question}}",
                "doc_to_target": "",
                "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 48},
                "metric_list": exact,
            },
            questions,
        ),
    }


def write_tasks(folder: Path, made: dict[str, tuple[Task, list[dict[str, Any]]]]) -> None:
    """Lay tasks and documents down as lm-evaluation-harness reads them."""
    for name, (settings, documents) in made.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        # JSON is YAML, too.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **settings}), encoding="utf-8")


def evaluate(model: Any, names: list[str], folder: Path, *, chat: bool) -> tuple[dict[str, Any], float]:
    """The harness's results, and the seconds that they took."""
    started = time.perf_counter()
    results = simple_evaluate(
        model,
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=0,
    )
    assert results is not None
    return results, time.perf_counter() - started


def compare(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> dict[str, Any]:
    """How far the answers to a task's instances are apart."""
    found = {"instances": 0, "largest_difference": 0.0, "greedy_differs": 0, "generations_differ": 0}
    for own, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
        assert own["arguments"] == other["arguments"]
        for (mine,), (theirs_,) in zip(own["resps"], other["resps"], strict=True):
            found["instances"] += 1
            if isinstance(mine, str):
                found["generations_differ"] += mine != theirs_
                continue
            values = [each[0] if isinstance(each, tuple | list) else each for each in (mine, theirs_)]
            found["largest_difference"] = max(found["largest_difference"], abs(values[0] - values[1]))
            if isinstance(mine, tuple | list):
                found["greedy_differs"] += mine[1] != theirs_[1]
    scores = [
        {key: value for key, value in results["results"][name].items() if isinstance(value, float)}
        for results in (ours, theirs)
    ]
    return {**found, "flexbatch": scores[0], "hf": scores[1]}


def main() -> None:
    """Evaluate with both, print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--rows", type=int, default=48, help="documents a task")
    parser.add_argument("--batch-size", type=int, default=16, help="of the Hugging Face backend")
    parser.add_argument("--tasks", help="only these, separated by commas")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    made = tasks(options.rows, random.Random(8))
    if options.tasks:
        made = {name: made[name] for name in options.tasks.split(",")}
    chats = [name for name in made if name.endswith("_chat")]
    groups = [(name, [name], name in chats) for name in made]
    report: dict[str, Any] = {
        "model": Path(options.model).name,
        "rows": options.rows,
        "hf_batch_size": options.batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tasks": {},
    }
    with tempfile.TemporaryDirectory() as place, LLM(options.model, device="cpu", dtype="float32") as llm:
        folder = Path(place)
        write_tasks(folder, made)
        ours = FlexbatchLM(llm, max_length=WINDOW, quiet=True)
        theirs = HFLM(
            pretrained=options.model,
            dtype="float32",
            device="cpu",
            batch_size=options.batch_size,
            max_length=WINDOW,
        )
        llm.generate([[5]])  # both are loaded before the clock starts
        for name, members, chat in groups:
            mine, seconds = evaluate(ours, members, folder, chat=chat)
            other, hf_seconds = evaluate(theirs, members, folder, chat=chat)
            found = compare(mine, other, name)
            report["tasks"][name] = {**found, "seconds": round(seconds, 2), "hf_seconds": round(hf_seconds, 2)}
            print(name, json.dumps(report["tasks"][name]), flush=True)
    values = report["tasks"].values()
    report["seconds"] = round(sum(task["seconds"] for task in values), 2)
    report["hf_seconds"] = round(sum(task["hf_seconds"] for task in values), 2)
    text = json.dumps(report, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
