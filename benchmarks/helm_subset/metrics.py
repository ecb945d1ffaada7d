"""The metrics that the synthetic scenarios are scored by, defined as HELM defines them; every one is 0 to 1."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _plain(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _members(text: str) -> set[str]:
    """What a sentence like "The cow is big and red." says of its subject."""
    if text == "Nothing.":
        return set()
    return set(text.replace(".", "").split(" is ")[-1].split(" and "))


def _sets(gold: str, answer: str) -> tuple[set[str], set[str]]:
    return _members(gold), _members(answer.split("\n")[0])


def f1_set_match(gold: str, answer: str) -> float:
    """F1 of the attributes named."""
    wanted, given = _sets(gold, answer)
    if not wanted:
        return float(not given)
    return 2 * len(wanted & given) / (len(wanted) + len(given))


def iou_set_match(gold: str, answer: str) -> float:
    """Intersection over union of the attributes named."""
    wanted, given = _sets(gold, answer)
    if not wanted:
        return float(not given)
    return len(wanted & given) / len(wanted | given)


def exact_set_match(gold: str, answer: str) -> float:
    """Whether exactly the right attributes are named."""
    wanted, given = _sets(gold, answer)
    return float(wanted == given)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": lambda gold, answer: float(bool(answer) and gold.strip() == answer),
    "quasi_exact_match": lambda gold, answer: float(bool(answer) and _plain(gold) == _plain(answer)),
    "prefix_exact_match": lambda gold, answer: float(bool(answer) and answer.startswith(gold.strip())),
    "quasi_prefix_exact_match": lambda gold, answer: float(bool(answer) and _plain(answer).startswith(_plain(gold))),
    "f1_set_match": f1_set_match,
    "iou_set_match": iou_set_match,
    "exact_set_match": exact_set_match,
}
"""name -> function of the right answer and a model's, stripped of white space."""
