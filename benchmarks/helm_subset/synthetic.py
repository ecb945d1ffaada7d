"""The two synthetic scenarios, drawn anew: the same problems that HELM draws, for they follow its order of draws.

Pattern matching is after LIME (Wu et al., 2021), rules in language after RuleTaker (Clark et al., 2020). Knows nothing
of prompts; HELM need not be installed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

TRAIN, VALID, TEST = 1000, 5000, 5000
SEED = 42
_ANIMALS = "zebra cobra stork penguin shark lion buffalo whale seal eagle horse rat"
_FRUITS = "apple peach watermelon banana grape kiwi pear strawberry blueberry blackberry"
_WORDS = [*_ANIMALS.split(), *_FRUITS.split()]
_LETTERS = ["X", "Y", "Z"]
_OPERATORS = ["+", "-", "*", "="]

_SUBJECTS = {
    "person": "Alice Bob Carol Dan Erin Frank",
    "animal": "dog cat rabbit mouse tiger lion bear squirrel cow panda hedgehog elephant giraffe hippo",
    "plant": "poppy dandelion tree rose sunflower",
}
# The first word of a line is the attribute, the line all the words that mean it: how many there are decides draws.
_ATTRIBUTES = """young
soft
sad
scary
cold chill cool
hot warm
smart clever wise intelligent
clean tidy
small little tiny
big enormous giant huge
good kind nice
beautiful pretty
red crimson
blue cobalt
green viridian
purple violet
boring dull
old ancient antique
strong powerful muscular
weak frail fragile
fast quick
slow sluggish
bad evil wicked mean
happy elated glad cheerful
round circular spherical"""


@dataclass(frozen=True, slots=True)
class Instance:
    """A problem, its solution, and the split that it belongs to: train, valid or test."""

    text: str
    answer: str
    split: str


def pattern_match() -> list[Instance]:
    """Which of four patterns of letters and operators gives a result, letters replaced by words."""
    draw = np.random.RandomState(SEED)
    return [Instance(*_pattern_problem(draw), split) for split in _splits()]


def natural_easy() -> list[Instance]:
    """What follows from rules in plain words and one fact about a subject that all of them name."""
    draw = random.Random(SEED)
    return [Instance(*_rule_problem(draw), split) for split in _splits()]


def _splits() -> Iterator[str]:
    for split, count in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        yield from [split] * count


# --- pattern matching ------------------------------------------------------------------------------------------------


def _pattern_problem(draw: Any) -> tuple[str, str]:
    letters = list(draw.choice(_LETTERS, size=draw.randint(2, 4)))
    distinct = sorted(set(letters))
    operators = list(draw.choice(_OPERATORS, size=draw.randint(2, 4)))
    pattern = _mixed(draw, letters, operators)
    meaning = _meaning(draw, distinct)
    _meaning(draw, distinct)  # HELM draws a second one, for another of its tasks
    result = " ".join(meaning.get(part, part) for part in pattern)
    offered = [" ".join(_mixed(draw, distinct, operators)) for _ in range(3)] + [" ".join(pattern)]
    draw.shuffle(offered)
    return f"Rules: {' | '.join(offered)} | Result: {result}", " ".join(pattern)


def _mixed(draw: Any, letters: list[str], operators: list[str]) -> list[str]:
    mixed = letters + operators
    draw.shuffle(mixed)
    return mixed


def _meaning(draw: Any, letters: list[str]) -> dict[str, str]:
    meaning = {}
    for letter in letters:
        count = draw.randint(1, 3)
        meaning[letter] = " ".join(draw.choice(_WORDS, size=count))
    return meaning


# --- rules in language -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rule:
    conditions: tuple[str, ...]
    joined: str
    consequence: str

    def follows(self, attributes: list[str]) -> bool:
        hits = [condition in attributes for condition in self.conditions]
        applies = all(hits) if self.joined == "and" else any(hits)
        return applies and self.consequence not in attributes


def _rule_problem(draw: random.Random) -> tuple[str, str]:
    kind = draw.choice(list(_SUBJECTS))
    subject = draw.choice(_SUBJECTS[kind].split())
    groups = [line.split() for line in _ATTRIBUTES.splitlines()]
    names = [words[0] for words in groups]
    rules = _rules(draw, names)
    while True:
        chosen = draw.sample(names, 2)
        for name in chosen:
            draw.choice(groups[names.index(name)])  # the word for it in HELM's hard mode
        found = [rule.consequence for rule in rules if rule.follows(chosen)]
        # Facts that nothing follows from are mostly drawn again.
        if found or draw.random() <= 0.1:
            break
    the, a, capital = _called(subject, kind)
    lines = [
        f"If {a} is {f' {rule.joined} '.join(rule.conditions)}, then {the} is {rule.consequence}." for rule in rules
    ]
    fact = f"{capital} is {' and '.join(chosen)}."
    text = "\n".join([*lines, "Fact:", fact, f"The following can be determined about {the}:"])
    return text, f"{capital} is {' and '.join(found)}." if found else "Nothing."


def _rules(draw: random.Random, names: list[str]) -> list[_Rule]:
    left = list(names)
    draw.shuffle(left)
    rules: list[_Rule] = []
    while len(left) > 2 and len(rules) < 5:
        count = draw.randint(2, 3)
        taken, left = left[:count], left[count:]
        rules.append(_Rule(tuple(taken[:-1]), draw.choice(["and", "or"]), taken[-1]))
    return rules


def _called(subject: str, kind: str) -> tuple[str, str, str]:
    """``the cow``, ``a cow``, ``The cow``; a person's name stands alone."""
    if kind == "person":
        return subject, subject, subject
    return f"the {subject}", f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}", f"The {subject}"


GENERATORS = {
    "synthetic_reasoning_pattern_match": pattern_match,
    "synthetic_reasoning_natural_easy": natural_easy,
}
