"""Compares what flexbatch makes of a GGUF file with what transformers makes of it: weights, text to ids, greedy tokens.

    python scripts/check_gguf.py FILE [--tokens N] [--prompts FILE]

Needs the package ``gguf``, and memory for the model in float32 twice. Exits with 1 if anything differs. Where
transformers does not know a file's way of splitting text, ids may differ, and that is said, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from flexbatch import LLM, SamplingParams
from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.models.registry import family_of
from flexbatch.text.codec import TextCodec

PROMPTS = (
    "The history of the steam engine began",
    "def fibonacci(n):",
    "In 1984, George",
    "Water boils at",
    "La capitale de la France",
    "Dear Sir,\n",
)
CHATS = ("Who wrote Hamlet?", "What is 12*12?", "Name three colours.")


def main() -> None:
    """Compare, and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens of each row")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts, one a line, instead of the built-in ones"
    )
    options = parser.parse_args()
    file: Path = options.file
    prompts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else PROMPTS
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    wrong = [*_weights(file, model), *_tokens(file, model.eval(), list(prompts), options.tokens)]
    print("\n".join(wrong) or "everything agrees")
    sys.exit(1 if wrong else 0)


def _weights(file: Path, model: Any) -> list[str]:
    folder = locate(str(file))
    checkpoint = open_checkpoint(folder, family_of(folder.shape).table(folder.shape))
    state = model.state_dict()
    print(f"weights: {len(checkpoint.entries)} tensors")
    return [
        f"weights: {name} differs"
        for name, entry in checkpoint.entries.items()
        if not torch.equal(checkpoint.read(entry).float(), state[name])
    ]


def _tokens(file: Path, model: Any, prompts: list[str], count: int) -> list[str]:
    codec = TextCodec.load(file)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    wrong = [f"ids of {text!r} differ" for text in prompts if tuple(tokenizer(text)["input_ids"]) != codec.encode(text)]
    rows = [codec.encode(prompt) for prompt in prompts]
    if codec.has_template:
        rows += [codec.encode_chat([{"role": "user", "content": text}]) for text in CHATS]
    with LLM(file, device="cpu") as llm:
        results = llm.generate(rows, SamplingParams(max_tokens=count))
        ends = list(locate(str(file)).shape.eos_token_ids)
    for row, result in zip(rows, results, strict=True):
        oracle = model.generate(
            torch.tensor([row]), max_new_tokens=count, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
        if oracle[0, len(row) :].tolist() != list(result.token_ids):
            wrong.append(f"tokens after {codec.decode(row)!r} differ")
    print(f"tokens: {len(rows)} rows of at most {count}")
    return wrong


if __name__ == "__main__":
    main()
