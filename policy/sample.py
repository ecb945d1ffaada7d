"""A sweep of a job's steady state, slice by slice, for the simulator. Real slices of made-up rows; pure."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping

from flexbatch.policy.cost import Way
from flexbatch.policy.memory import Cut
from flexbatch.policy.steady import TIER_OF
from flexbatch.policy.workload import Workload
from flexbatch.requests import Request, TokenizedRequest
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.spread import Spread
from flexbatch.scheduler.sweep import MicroBatch, Slice, Sweep, pack_by_sequences, pack_by_tokens, part_by_attention
from flexbatch.units import Shares

_SOURCE = TokenizedRequest(Request("", SamplingParams(), ()), 0, ())


def steady_sweep(
    workload: Workload,
    cut: Cut,
    ways: Mapping[Way, float],
    hidden: Shares,
    sequences: int,
    *,
    decoding: bool = True,
    prompts: bool = True,
    prompt_tokens: float | None = None,
    on_gpu: bool,
    max_positions: int,
    number: int = 1,
) -> Sweep:
    """A sweep of ``sequences`` rows in flight, their lengths and ages spread as the job's.

    ``on_gpu``: products run on a GPU. ``prompt_tokens`` come in; by default as many as in the mean sweep. Without
    ``decoding`` it is a block's first one.
    """
    lives = [
        max(1, min(asked, max_positions + 1 - length))
        for length, asked in zip(workload.prompts, workload.generations, strict=True)
    ]
    ends = list(itertools.accumulate(lives))
    below = sum(part for way, part in ways.items() if way != "gpu")
    streams = sum(part for way, part in ways.items() if way in ("cpu_up", "disk_up")) / below if below else 0.0
    shares = Shares(
        *(sum(part for way, part in ways.items() if TIER_OF[way] == tier) for tier in ("gpu", "cpu", "disk"))
    )
    tiers, waits = Spread(shares), Spread(hidden)
    slices: dict[str, list[Slice]] = {tier: [] for tier in ("gpu", "cpu", "disk")}
    for place in range(sequences if decoding else 0):
        at = int((place + 0.5) / sequences * ends[-1])
        row = bisect.bisect_right(ends, at)
        offset = at - (ends[row] - lives[row])
        if offset == 0 and prompts:
            continue  # at its prompt
        start = workload.prompts[row] + max(0, offset - 1)
        slices[tiers.choose(1)].append(_slice(start, 1, place))
    if prompts:
        total = sum(workload.prompts) - (0 if cut.block else sum(workload.shared))
        left = prompt_tokens if prompt_tokens is not None else sequences * total / ends[-1]
        place = 0
        while round(left) > 0:
            row = int((place * 0.6180339887 % 1.0) * len(workload.prompts))
            start = workload.shared[row] if workload.shared and not cut.block else 0
            count = max(1, min(workload.prompts[row] - start, round(left)))
            slices[tiers.choose(1)].append(_slice(start, count, place))
            left -= count
            place += 1
    batches: list[MicroBatch] = []
    for tier, at_home in slices.items():
        for part, streamed in part_by_attention(at_home, tier, streams if on_gpu else None):
            pages = cut.staged_pages if streamed or tier == "disk" else 2**62
            packed = (
                pack_by_sequences(part, cut.micro_sequences)
                if cut.block
                else pack_by_tokens(part, cut.micro_tokens, pages, cut.page_tokens)
            )
            for pieces in packed:
                tokens = sum(piece.count for piece in pieces)
                batches += [MicroBatch(pieces, tier, waits.choose(tokens), streamed)]
    return Sweep(number, tuple(batches))


def _slice(start: int, count: int, age: int) -> Slice:
    return Slice(Sequence(_SOURCE, 0, [], age=age), start, count, True, start + count, start + count)
