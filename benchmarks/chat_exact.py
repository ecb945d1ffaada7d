"""Chat rows through ``flexbatch run``, token for token against transformers answering each chat alone.

    python benchmarks/chat_exact.py --model DIR [--rows 50] [--max-tokens 32] [--output FILE] [OPTION ...]

The rows mix system prompts, questions, passages to work on and earlier turns. Both sides are greedy and in fp32;
transformers renders the chat with ``apply_chat_template`` and generates with a batch of one. Options that are not this
script's own go to ``flexbatch run``. A first difference is excused only where transformers' own two best logits are
within 1e-4 of each other; excused rows are counted and shown. Ends with exit code 1 if any other row differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

NEAR_TIE = 1e-4
_PASSAGES = [
    passage.strip()
    for passage in (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").split("\n\n")
    if 80 <= len(passage) <= 1500
]
_SYSTEMS = (
    "You are a pirate. Answer every question as one.",
    "Answer in one short sentence.",
    "You are a patient teacher of mathematics.\n\nShow each step on a line of its own.",
    "Du antwortest immer auf Deutsch.",
    "Reply with JSON only: an object with the keys `answer` and `confidence`.",
    "You edit prose. Be strict, kind and brief; never praise what you would change.",
)
_QUESTIONS = (
    "What is the capital of France?",
    "Explain to a child why the sky is blue.",
    "What is 17 * 24? And 2024 - 1999?",
    "Write a haiku about the sea.",
    "Give me a Python function that reverses a string.",
    "Wie spät ist es, wenn der kleine Zeiger auf 3 steht?",
    "List three rivers of Africa, with their lengths in km.",
    "Name a word that rhymes with “orange” 🍊",
    "Translate to French:   good   morning,\tfriend",
    "hi",
    "Which is heavier, a kilogram of feathers or of lead? Why?",
    "Write the opening line of a ghost story.",
    "What does `sed -n '5,10p' file` do?",
    "Describe 東京 in two sentences.",
)
_TASKS = (
    "Summarise this passage:\n\n{}",
    "Who is spoken of here?\n\n{}",
    "Continue the story.\n\n{}",
    "Say the same in plain modern English:\n{}",
    "How many sentences has this text?\n\n{}\n\nAnswer with a number.",
)
_REPLIES = (
    "Of course.",
    "I am not sure about that.",
    "Yes: here is what I know about it.",
    "4",
    "Good morning!\n\nHello.",
)


@dataclass(frozen=True)
class Answer:
    """What transformers said to one chat: prompt length, tokens, their text, and the gap of its two best logits."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    gaps: list[float]


def chats(count: int) -> list[list[dict[str, str]]]:
    """Return the rows' messages: some with a system prompt, one to four user turns, from a word to a page."""
    rng = random.Random(0)

    def question() -> str:
        return rng.choice(_QUESTIONS) if rng.random() < 0.6 else rng.choice(_TASKS).format(rng.choice(_PASSAGES))

    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": rng.choice(_SYSTEMS)}] if rng.random() < 0.6 else []
        for _ in range(rng.choice((0, 0, 1, 1, 3))):
            messages += [
                {"role": "user", "content": question()},
                {"role": "assistant", "content": rng.choice((*_REPLIES, rng.choice(_PASSAGES)))},
            ]
        made.append([*messages, {"role": "user", "content": question()}])
    return made


def flexbatch_answers(
    model: str, rows: Sequence[list[dict[str, str]]], new: int, extra: Sequence[str]
) -> list[dict[str, Any]]:
    """Run the command line on all rows at once and return its output rows."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "rows.jsonl"), Path(folder, "answers.jsonl")
        lines = [json.dumps({"id": str(index), "messages": messages}) for index, messages in enumerate(rows)]
        source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        command = [sys.executable, "-m", "flexbatch", "run", "--model", model, "-i", str(source), "-o", str(target)]
        subprocess.run([*command, "--dtype", "float32", "--max-tokens", str(new), *extra], check=True)
        return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def transformers_answers(path: str, rows: Sequence[list[dict[str, str]]], new: int) -> list[Answer]:
    """Answer each chat alone, greedily."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # Only what ends a text is taken from the model's generation settings, as flexbatch does.
    ends = model.generation_config.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0] if isinstance(ends, list) else ends,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answers = []
    for messages in rows:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            generated = model.generate(**prompt, generation_config=greedy)
        length = prompt["input_ids"].shape[1]
        tokens: list[int] = generated.sequences[0, length:].tolist()
        best = torch.cat(generated.logits).topk(2).values
        gaps: list[float] = (best[:, 0] - best[:, 1]).tolist()
        answers.append(Answer(length, tokens, tokenizer.decode(tokens, skip_special_tokens=True), gaps))
    return answers


def compare(results: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> dict[str, Any]:
    """Count equal rows; describe the excused and the wrong ones."""
    equal = 0
    excused: list[str] = []
    wrong: list[str] = []
    for result, answer in zip(results, answers, strict=True):
        name, tokens = result["id"], result["token_ids"]
        if result["prompt_tokens"] != answer.prompt_tokens:
            wrong.append(f"row {name}: {result['prompt_tokens']} prompt tokens, not {answer.prompt_tokens}")
        elif tokens == answer.tokens and result["text"] == answer.text:
            equal += 1
        elif tokens == answer.tokens:
            wrong.append(f"row {name}: the same tokens, another text: {result['text']!r}, not {answer.text!r}")
        else:
            pairs = enumerate(zip(tokens, answer.tokens, strict=False))
            place = next((at for at, (ours, theirs) in pairs if ours != theirs), min(len(tokens), len(answer.tokens)))
            gap = answer.gaps[place] if place < len(answer.gaps) else float("inf")
            note = f"row {name}: differs from token {place} on, where the two best logits are {gap:.2g} apart"
            (excused if gap < NEAR_TIE else wrong).append(note)
    return {"equal": equal, "excused": excused, "wrong": wrong}


def main() -> int:
    """Run both sides, print one JSON object, and return 1 if a row differs without excuse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path)
    options, extra = parser.parse_known_args()
    rows = chats(options.rows)
    results = flexbatch_answers(options.model, rows, options.max_tokens, extra)
    answers = transformers_answers(options.model, rows, options.max_tokens)
    lengths = [answer.prompt_tokens for answer in answers]
    report = {
        "model": Path(options.model).name,
        "options": extra,
        "rows": len(rows),
        "max_tokens": options.max_tokens,
        **compare(results, answers),
        "ended_by_themselves": sum(result["finish_reason"] == "stop" for result in results),
        "tokens_compared": sum(len(answer.tokens) for answer in answers),
        "prompt_tokens": {"shortest": min(lengths), "longest": max(lengths), "sum": sum(lengths)},
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
