"""transformers as the oracle: greedy rows generated alone, with the gap between its two best logits at every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexbatch.requests import Request, Result, TokenizedRequest
from flexbatch.sampling import SamplingParams
from tests.tiny import load_oracle

NEAR_TIE = 1e-4  # a first difference is excused only where the oracle's two best logits are this close


@dataclass(frozen=True)
class Row:
    """What transformers generated for one prompt: tokens, logit gaps, log-probabilities of its tokens."""

    prompt: tuple[int, ...]
    new: int
    tokens: tuple[int, ...]
    gaps: tuple[float, ...]
    logprobs: tuple[float, ...]


@dataclass
class Comparison:
    """Rows that agree, rows excused by a near tie, and those that differ."""

    equal: int = 0
    excused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def ragged_rows(
    rng: random.Random, vocab: int, count: int, *, longest: int = 70, new: int = 24
) -> list[tuple[tuple[int, ...], int]]:
    """Random prompts of 1 to ``longest`` tokens with 1 to ``new`` tokens to generate."""
    return [
        (tuple(rng.randrange(vocab) for _ in range(rng.randint(1, longest))), rng.randint(1, new)) for _ in range(count)
    ]


def generate_alone(path: Path, rows: Sequence[tuple[tuple[int, ...], int]]) -> list[Row]:
    """Generate each row by itself, greedily, with ``model.generate``."""
    model = load_oracle(path)
    return [generate_row(model, prompt, new) for prompt, new in rows]


def generate_row(model: Any, prompt: tuple[int, ...], new: int) -> Row:
    """Generate one row with a model of transformers, or of PEFT."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = generated.sequences[0, len(prompt) :].tolist()
    logits = torch.cat(generated.logits)
    best = logits.topk(2).values
    logprobs = logits.log_softmax(-1)[range(len(tokens)), tokens]
    return Row(prompt, new, tuple(tokens), tuple((best[:, 0] - best[:, 1]).tolist()), tuple(logprobs.tolist()))


def requests_of(rows: Sequence[Row], **params: object) -> list[TokenizedRequest]:
    """The same rows as requests of ours."""
    made = []
    for index, row in enumerate(rows):
        sampling = SamplingParams(max_tokens=row.new, **params)  # type: ignore[arg-type]
        made.append(TokenizedRequest(Request(str(index), sampling, prompt=row.prompt), index, row.prompt))
    return made


def compare(results: Sequence[Result], rows: Sequence[Row]) -> Comparison:
    """Compare results (any order, ids are places) with the oracle's rows, token by token."""
    comparison = Comparison()
    assert sorted(int(result.id) for result in results) == list(range(len(rows)))
    for result in results:
        row = rows[int(result.id)]
        if result.token_ids == row.tokens:
            comparison.equal += 1
            continue
        place = next(
            (i for i, (a, b) in enumerate(zip(result.token_ids, row.tokens, strict=False)) if a != b),
            min(len(result.token_ids), len(row.tokens)),
        )
        gap = row.gaps[place] if place < len(row.gaps) else float("inf")
        note = f"row {result.id} differs at token {place} (gap {gap:.2g}): {result.token_ids} != {row.tokens}"
        (comparison.excused if gap < NEAR_TIE else comparison.wrong).append(note)
    return comparison


def assert_equal(results: Sequence[Result], rows: Sequence[Row]) -> None:
    """Fail on any unexcused difference; excused ones are printed (and may not be many)."""
    comparison = compare(results, rows)
    for note in comparison.excused:
        print("excused:", note)
    assert not comparison.wrong, "\n".join(comparison.wrong)
    assert len(comparison.excused) <= max(1, len(rows) // 12)
