"""Finish two stories with the demo model, from Python."""

from __future__ import annotations

from flexbatch import LLM, SamplingParams

PROMPTS = [
    "Once upon a time, there was a little owl who",
    "The children found a map in the attic. It showed",
]


def main() -> None:
    """Print each prompt with what the model makes of it."""
    with LLM("demo") as llm:
        for prompt, result in zip(PROMPTS, llm.generate(PROMPTS, SamplingParams(max_tokens=60)), strict=True):
            print(f"{prompt}{result.text}\n[{result.completion_tokens} tokens, {result.finish_reason}]\n")


if __name__ == "__main__":
    main()
