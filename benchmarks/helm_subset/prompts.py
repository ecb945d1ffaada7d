"""From instances to prompts as HELM makes them: which are taken, which examples stand before them, what fits.

The rules are those of HELM's generation adapter; draws follow its order, so that prompts are equal to the byte.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.helm_subset.scenarios import PromptStyle
from benchmarks.helm_subset.synthetic import Instance


@dataclass(frozen=True, slots=True)
class Prompted:
    """An instance to be answered: ``number`` is its place among all instances of the scenario, from 0."""

    number: int
    instance: Instance
    prompt: str


def prompted(
    instances: Sequence[Instance], style: PromptStyle, tokenizer: Any, window: int, most: int | None
) -> list[Prompted]:
    """The prompts of at most ``most`` instances that are not for training, in HELM's order."""
    chosen = taken(instances, most)
    examples = sampled(instances, style.examples)
    return [
        Prompted(number, instances[number], _fitting(style, examples, instances[number], tokenizer, window))
        for number in chosen
    ]


def taken(instances: Sequence[Instance], most: int | None) -> list[int]:
    """The places of the instances to answer: all that are not for training, or a draw of ``most``."""
    open_ones = [number for number, instance in enumerate(instances) if instance.split != "train"]
    if most is None or most >= len(open_ones):
        return open_ones
    return [open_ones[place] for place in np.random.RandomState(0).choice(len(open_ones), most, replace=False)]


def sampled(instances: Sequence[Instance], count: int) -> list[Instance]:
    """The examples of all prompts: answers that many instances share come first, ties in random order."""
    draw = random.Random(0)
    by_answer: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        if instance.split == "train":
            by_answer[instance.answer].append(instance)
    by_count: dict[int, list[str]] = defaultdict(list)
    for answer in sorted(by_answer):
        by_count[len(by_answer[answer])].append(answer)
    order: list[str] = []
    for size in sorted(by_count, reverse=True):
        draw.shuffle(by_count[size])
        order += by_count[size]
    count = min(count, sum(map(len, by_answer.values())))
    found: list[Instance] = []
    while len(found) < count:
        for answer in order:
            left = by_answer[answer]
            if left and len(found) < count:
                found.append(left.pop(draw.randrange(len(left))))
    return found


def _fitting(style: PromptStyle, examples: Sequence[Instance], instance: Instance, tokenizer: Any, window: int) -> str:
    """The prompt with as many examples as the window takes; cut on the right if it fits with none."""
    question = style.input_prefix + instance.text + style.input_suffix + style.output_prefix.rstrip()
    shown = [
        style.input_prefix + one.text + style.input_suffix + style.output_prefix + one.answer + style.output_suffix
        for one in examples
    ]
    room = window - style.max_tokens
    for kept in range(len(shown), 0, -1):
        text = "\n".join([style.instructions, *shown[:kept], question])
        if _length(tokenizer, text) <= room:
            return text
    text = f"{style.instructions}\n{question}"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) > room:
        text = tokenizer.decode(tokens[:room], clean_up_tokenization_spaces=False)
        while _length(tokenizer, text) > room:
            text = text[:-1]
    return text


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))
