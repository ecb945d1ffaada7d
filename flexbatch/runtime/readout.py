"""Reads tokens and log-probabilities off the last hidden states, a bounded number of logit rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels.sampling import choose, token_logprobs
from flexbatch.runtime.micro_batch import MicroBatchState, Readout
from flexbatch.scheduler.randomness import uniform
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.sweep import Slice


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One row of logits: of which slice, and the prompt token it scores (None: it chooses the next token).

    ``branch``: the position, where it also scores tokens that follow in other prompts.
    """

    row: int
    slice_index: int
    target: int | None
    branch: int | None = None


def read(state: MicroBatchState, head: Callable[[Tensor, SequenceOf[int]], Tensor], logit_rows: int) -> list[Readout]:
    """Return one Readout a slice. ``head`` maps [R, hidden], rows of the hidden state, to logits [R, vocab].

    R is at most ``logit_rows``; ``head`` is also told which rows they are.
    """
    slices = state.batch.slices
    readouts = [Readout() for _ in slices]
    wanted = _wanted_rows(slices)
    hidden = state.hidden()
    for begin in range(0, len(wanted), logit_rows):
        rows = wanted[begin : begin + logit_rows]
        numbers = [row.row for row in rows]
        logits = head(hidden.index_select(0, torch.tensor(numbers, device=hidden.device)), numbers).float().contiguous()
        _choose(slices, rows, logits, readouts)
    return readouts


def _wanted_rows(slices: tuple[Slice, ...]) -> list[_Wanted]:
    wanted: list[_Wanted] = []
    base = 0
    for index, piece in enumerate(slices):
        tokens = piece.sequence.tokens
        wanted += [
            _Wanted(
                base + position - piece.start,
                index,
                tokens[position + 1],
                position if position in piece.sequence.branches else None,
            )
            for position in range(piece.score_from, piece.score_to)
        ]
        if piece.samples:
            wanted.append(_Wanted(base + piece.count - 1, index, None))
        base += piece.count
    return wanted


def _choose(slices: tuple[Slice, ...], rows: list[_Wanted], logits: Tensor, readouts: list[Readout]) -> None:
    tokens = torch.tensor([row.target if row.target is not None else 0 for row in rows])
    sampled = [place for place, row in enumerate(rows) if row.target is None]
    if sampled:
        sources = [slices[rows[place].slice_index].sequence for place in sampled]
        params = [sequence.source.request.params for sequence in sources]
        draws = [
            uniform(sequence.source.request.params, sequence.source.request.id, len(sequence.generated))
            for sequence in sources
        ]
        subset = logits if len(sampled) == len(rows) else logits[sampled]
        tokens[sampled] = choose(subset, params, draws).cpu()

    counts = [_count(slices[row.slice_index].sequence, row) for row in rows]
    measured = [place for place, count in enumerate(counts) if count is not None]
    values: dict[int, tuple[float, dict[int, float]]] = {}
    if measured:
        most = max(count for count in counts if count is not None)
        subset = logits if len(measured) == len(rows) else logits[measured]
        own, top_ids, top_values = token_logprobs(subset, tokens[measured].to(subset.device), most)
        for place, value, ids, tops in zip(measured, own.tolist(), top_ids.tolist(), top_values.tolist(), strict=True):
            count = counts[place] or 0
            values[place] = (value, dict(zip(ids[:count], tops[:count], strict=True)))

    for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
        readout = readouts[row.slice_index]
        logprob, top = values.get(place, (None, {}))
        if row.target is None:
            readout.token, readout.logprob, readout.top = token, logprob, top
        elif logprob is not None:
            readout.prompt_values.append(logprob)
            readout.prompt_top.append(top)
        if row.branch is not None:
            follow = slices[row.slice_index].sequence.branches[row.branch]
            logprobs = logits[place : place + 1].log_softmax(dim=-1)[0, list(follow)]
            readout.prompt_branches[row.branch] = dict(zip(follow, logprobs.tolist(), strict=True))


def _count(sequence: Sequence, row: _Wanted) -> int | None:
    """How many of the most likely tokens are wanted; None: no log-probability at all."""
    return sequence.source.request.params.logprobs if row.target is None else sequence.prompt_top
