"""What a small model learns of a real task: answers that are right on unseen rows, before and after finetuning.

    pip download --no-deps --no-binary :all: bigbench==1.0.0    (358 MB; Apache-2.0), and unpack it
    python benchmarks/finetune_task.py --model DIR --task bigbench/benchmark_tasks/intent_recognition/task.json \
        --work FOLDER --output FILE

BIG-bench's intent_recognition (693 utterances, seven intents) as chats: the task's own instruction as the system
message, the utterance as the user's, the name of the intent as the answer. An answer is right when the greedy text,
stripped, is the name (``exact``); or, the task's own measure, when the right name is the likeliest of the seven
(``choice``, over the first ``--choices`` rows). Rows are shuffled once with a fixed seed and split; none of the test's
rows is trained on.
``--stage`` does a part only, so that long runs can be made in pieces: figures are added to ``--output``, and a training
that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from flexbatch import LLM, SamplingParams

TRAINING: dict[str, Any] = {
    "rank": 8,
    "alpha": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "batch_size": 8,
    "epochs": 1,
    "save_every": 5,
}


def load(path: Path, count: int, held_out: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows to train on and rows to test on, as chats that end with the right answer."""
    task = json.loads(path.read_text())
    rows = [
        {
            "messages": [
                {"role": "system", "content": task["task_prefix"].strip()},
                {"role": "user", "content": example["input"]},
                {"role": "assistant", "content": max(example["target_scores"], key=example["target_scores"].get)},
            ]
        }
        for example in task["examples"]
    ]
    random.Random(seed).shuffle(rows)
    return rows[held_out : held_out + count], rows[:held_out]


def choose(llm: LLM, rows: list[dict[str, Any]], names: list[str], lora: str | None) -> dict[str, Any]:
    """Return the share of rows whose right answer is the likeliest of ``names`` after the chat's prompt."""
    tokenizer = llm.tokenizer
    pairs = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        context = tokenizer.encode(prompt, add_special_tokens=False)
        pairs += [
            (context, tokenizer.encode(f"{name}{tokenizer.eos_token}", add_special_tokens=False)) for name in names
        ]
    scores = [score.logprob for score in llm.score(pairs, lora=lora)]
    right = 0
    for index, row in enumerate(rows):
        mine = scores[index * len(names) : (index + 1) * len(names)]
        right += names[mine.index(max(mine))] == row["messages"][-1]["content"]
    return {"rows": len(rows), "right": right, "accuracy": right / len(rows)}


def measure(llm: LLM, rows: list[dict[str, Any]], lora: str | None) -> dict[str, Any]:
    """Return the share of right answers, and some that were given."""
    started = time.perf_counter()
    prompts = [row["messages"][:-1] for row in rows]
    results = llm.generate(prompts, SamplingParams(max_tokens=12), lora=lora)
    wanted = [row["messages"][-1]["content"] for row in rows]
    given = [result.text.strip() for result in results]
    right = sum(said == name for said, name in zip(given, wanted, strict=True))
    return {
        "rows": len(rows),
        "right": right,
        "accuracy": right / len(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "answers": [{"wanted": name, "given": said} for said, name in zip(given, wanted, strict=True)][:8],
    }


def main() -> None:
    """Do the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path, help="where the adapter and its checkpoints go")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--train", type=int, default=240)
    parser.add_argument("--test", type=int, default=150)
    parser.add_argument("--choices", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("all", "before", "train", "after"), default="all")
    options = parser.parse_args()
    learned, tested = load(options.task, options.train, options.test, options.seed)
    figures: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    figures["task"] = {"name": options.task.parent.name, "train": len(learned), "test": len(tested)}
    figures["training"] = TRAINING
    names = sorted({row["messages"][-1]["content"] for row in learned})
    with LLM(options.model, lora_dir=options.work if options.stage == "after" else None) as llm:
        if options.stage in ("all", "before"):
            figures["before"] = {
                "exact": measure(llm, tested, None),
                "choice": choose(llm, tested[: options.choices], names, None),
            }
        if options.stage in ("all", "train"):
            stats = dict(llm.finetune(learned, options.work / "intent", **TRAINING).stats)
            figures["losses"] = [round(loss, 4) for loss in stats.pop("losses")]
            figures["train"] = stats
        if options.stage in ("all", "after"):
            figures["after"] = {
                "exact": measure(llm, tested, "intent"),
                "choice": choose(llm, tested[: options.choices], names, "intent"),
            }
    options.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "losses"}))


if __name__ == "__main__":
    main()
