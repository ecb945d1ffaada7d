"""Five-shot multiple choice on a CPU: shared prefixes on, off, and transformers with padded batches, in turns.

    python benchmarks/shared_prefix.py --model DIR [--questions 16] [--tasks score,generate] [--output FILE]

Every prompt begins with the same five worked examples (about nine tenths of its tokens). ``score``: four rows a
question, one for each answer, scored by log-likelihood. ``generate``: one row a question, a few new tokens. The
questions are drawn from sentences of real prose with words left out. All run in each of ``--dtypes`` with the same
threads, transformers at the best of several batch sizes; it keeps only the logits that count, and rows are sorted by
length. ``--systems`` and ``--merge`` run one system at a time and join the results: on a machine that others use, too.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexbatch import LLM, SamplingParams

_TEXT = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8")
_LETTERS = "ABCD"
_SHOTS = 5
_NEW = 4
Rows = list[tuple[list[int], int]]


def question(rng: random.Random, sentences: list[str], words: list[str], least: int) -> tuple[str, list[str], int]:
    """A sentence with a word left out, four words to choose from, and the place of the right one."""
    while True:
        sentence = rng.choice(sentences)
        places = [at for at, word in enumerate(sentence.split()) if len(word) > 4 and word.isalpha()]
        if len(sentence.split()) >= least and places:
            break
    parts = sentence.split()
    at = rng.choice(places)
    options = [parts[at], *rng.sample(words, 3)]
    rng.shuffle(options)
    right = options.index(parts[at])
    parts[at] = "____"
    return " ".join(parts), options, right


def make(tokenizer: Any, count: int, task: str) -> tuple[Rows, list[int]]:
    """Rows as (tokens, where the answer starts), and the right answers."""
    rng = random.Random(0)
    sentences = [part.replace("\n", " ").strip() for part in re.split(r"(?<=[.!?])\s", _TEXT)]
    words = sorted({word.lower() for word in re.findall(r"[A-Za-z]{5,9}", _TEXT)})
    short = [part for part in sentences if 10 <= len(part.split()) <= 22]
    long = [part for part in sentences if 55 <= len(part.split()) <= 80]

    def asked(text: str, options: list[str]) -> str:
        listed = " ".join(f"({letter}) {option}" for letter, option in zip(_LETTERS, options, strict=True))
        return f"Sentence: {text}\nWords: {listed}\nAnswer:"

    shots = []
    for _ in range(_SHOTS):
        text, options, right = question(rng, long, words, 0)
        shots.append(f"{asked(text, options)} {options[right]}\n\n")
    head = "Which of the four words belongs in the gap? Give the word.\n\n" + "".join(shots)
    rows: Rows = []
    answers = []
    for _ in range(count):
        text, options, right = question(rng, short, words, 0)
        context = tokenizer(head + asked(text, options))["input_ids"]
        answers.append(right)
        if task == "generate":
            rows.append((context, len(context)))
        else:
            rows += [(context + tokenizer(f" {option}")["input_ids"], len(context)) for option in options]
    return rows, answers


def run_flexbatch(llm: LLM, rows: Rows, task: str) -> list[Any]:
    """Log-likelihood of each answer, or the new tokens of each row."""
    if task == "generate":
        results = llm.generate([tokens for tokens, _ in rows], SamplingParams(max_tokens=_NEW, ignore_eos=True))
        return [list(result.token_ids) for result in results]
    return [score.logprob for score in llm.score([(tokens[:start], tokens[start:]) for tokens, start in rows])]


def run_transformers(model: Any, rows: Rows, task: str, batch: int) -> list[Any]:
    """The same in padded batches."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    found: list[Any] = [None] * len(rows)
    for begin in range(0, len(order), batch):
        part = order[begin : begin + batch]
        longest = max(len(rows[row][0]) for row in part)
        ids = torch.tensor([[0] * (longest - len(rows[row][0])) + rows[row][0] for row in part])
        mask = torch.tensor([[int(at >= longest - len(rows[row][0])) for at in range(longest)] for row in part])
        with torch.inference_mode():
            if task == "generate":
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False, pad_token_id=0
                )
                for row, tokens in zip(part, out[:, longest:].tolist(), strict=True):
                    found[row] = tokens
                continue
            kept = max(len(rows[row][0]) - rows[row][1] for row in part) + 1
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(
                ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept, use_cache=False
            ).logits
            logprobs = logits.float().log_softmax(-1)
            for place, row in enumerate(part):
                tokens, start = rows[row]
                wanted = torch.tensor(tokens[start:])
                own = logprobs[place, -len(wanted) - 1 : -1]
                found[row] = own.gather(1, wanted[:, None]).sum().item()
    return found


def timed(run: Callable[[], list[Any]], runs: int) -> tuple[float, list[Any]]:
    """Median seconds of ``runs`` calls, and what the last one gave."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), found


def flexbatch_report(options: argparse.Namespace, rows: Rows, task: str, dtype: Any, *, share: bool) -> dict[str, Any]:
    """Seconds and results of ours."""
    with LLM(
        options.model, device="cpu", dtype=dtype, share_prefixes=share, max_sequences=options.max_sequences
    ) as llm:
        run_flexbatch(llm, rows[:4], task)
        before = llm.stats()
        seconds, found = timed(lambda: run_flexbatch(llm, rows, task), options.runs)
        after = llm.stats()
    linear = after["flops"]["linear"] - before["flops"]["linear"]
    return {
        "seconds": seconds,
        "shared_prompt_tokens": (after["shared_prompt_tokens"] - before["shared_prompt_tokens"]) // options.runs,
        "linear_flops": linear // options.runs,
        "peak_kv_bytes": sum(after["peak_kv_bytes"].values()),
        "sequences": after["plan"]["max_sequences"],
        "predicted_s": after["plan"]["predicted"]["job_s"],
        "step_s": {name: after["step_s"][name] - before["step_s"].get(name, 0.0) for name in after["step_s"]},
        "found": found,
    }


def transformers_report(
    options: argparse.Namespace, rows: Rows, task: str, dtype: str, before: dict[str, Any]
) -> dict[str, Any]:
    """Seconds at every batch size, each once, and results of the best; joined with those of ``before``."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype)).eval()
    run_transformers(model, rows[:2], task, 2)
    by_size: dict[str, float] = dict(before.get("by_batch_s", {}))
    found: list[Any] = before.get("found", [])
    for size in [int(size) for size in options.sizes.split(",")]:
        seconds, results = timed(lambda size=size: run_transformers(model, rows, task, size), 1)  # type: ignore[misc]
        if seconds <= min(by_size.values(), default=seconds):
            found = results
        by_size[str(size)] = seconds
    return {"seconds": min(by_size.values()), "by_batch_s": by_size, "found": found}


def summary(part: dict[str, Any], rows: Rows, answers: list[int], task: str) -> dict[str, Any]:
    """Ratios, and whether all found the same."""
    made: dict[str, Any] = {
        "rows": len(rows),
        "mean_prompt_tokens": statistics.mean(len(tokens) for tokens, _ in rows),
    }
    shared = part.get("shared", {})
    for name in ("unshared", "transformers"):
        for dtype in [dtype for dtype in part.get(name, {}) if dtype in shared]:
            own, other = shared[dtype], part[name][dtype]
            ratios = made.setdefault(dtype, {})
            ratios[f"{name}_over_shared"] = other["seconds"] / own["seconds"]
            if "peak_kv_bytes" in other:
                ratios["kv_bytes_unshared_over_shared"] = other["peak_kv_bytes"] / own["peak_kv_bytes"]
            pairs = list(zip(own["found"], other["found"], strict=True))
            if task == "generate":
                ratios[f"rows_equal_to_{name}"] = sum(first == second for first, second in pairs)
            else:
                ratios[f"largest_difference_to_{name}"] = max(abs(first - second) for first, second in pairs)
        if shared and part.get(name):
            best = [min(run["seconds"] for run in runs.values()) for runs in (part[name], shared)]
            made[f"best_{name}_over_best_shared"] = best[0] / best[1]
    for name, runs in part.items():
        for dtype, run in runs.items() if task == "score" else ():
            groups = [run["found"][at : at + 4] for at in range(0, len(rows), 4)]
            right = sum(group.index(max(group)) == answer for group, answer in zip(groups, answers, strict=True))
            made.setdefault("accuracy", {})[f"{name}, {dtype}"] = right / len(answers)
    return made


def compact(report: dict[str, Any]) -> str:
    """JSON with every list of plain values on one line."""
    text = json.dumps(report, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def main() -> None:
    """Run what is asked for and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--tasks", default="score,generate")
    parser.add_argument("--systems", default="shared,unshared,transformers")
    parser.add_argument("--sizes", default="4,8,16,32", help="batch sizes that transformers is tried at")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="types to compute in")
    parser.add_argument("--max-sequences", type=int, help="rows in flight in flexbatch (default: as planned)")
    parser.add_argument("--merge", action="store_true", help="keep what OUTPUT has of other systems and sizes")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    report: dict[str, Any] = {}
    if options.merge and options.output and options.output.exists():
        report = json.loads(options.output.read_text(encoding="utf-8"))
    report["machine"] = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    report["torch"] = torch.__version__
    for task in options.tasks.split(","):
        rows, answers = make(tokenizer, options.questions, task)
        part = report.setdefault(task, {})
        part.pop("summary", None)
        for system in options.systems.split(","):
            for dtype in options.dtypes.split(","):
                runs = part.setdefault(system, {})
                if system == "transformers":
                    runs[dtype] = transformers_report(options, rows, task, dtype, runs.get(dtype, {}))
                else:
                    runs[dtype] = flexbatch_report(options, rows, task, dtype, share=system == "shared")
                made = summary(part, rows, answers, task)
                if options.output:
                    text = compact(report | {task: {**part, "summary": made}})
                    options.output.write_text(text, encoding="utf-8")
        part["summary"] = made
        print(json.dumps({task: part["summary"]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
