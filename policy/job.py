"""How long a whole job takes: ramp-up, steady state and drain of one plan, in aggregate. Sees no single row or Step."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from flexbatch.policy.cost import Cost, Load, Traffic, Way
from flexbatch.policy.steady import STAGED, Choice, mixes, prompt_way
from flexbatch.policy.workload import Mean

_STRIDES = 16  # moments at which a row's life is looked at
_WAVES = 3  # so many times the sequences in flight are followed; what is between is steady
_WAVES_ALIKE = 8  # where all rows take about as many sweeps: those that begin together end together
_ALIKE = 0.05  # the most that they then differ by: eight waves later they are still far from evenly spread
_MANY_BEGIN = 16.0  # rows that begin in a sweep: with more, chance evens out


@dataclass(frozen=True, slots=True)
class Setting:
    """One plan for one job: ``ways`` are fractions of the sequences; ``pages`` what all tiers hold."""

    choice: Choice
    cost: Cost
    weights: Traffic
    mean: Mean
    ways: Mapping[Way, float]
    sequences: int
    prompt_tokens: int
    pages: int
    overlap: bool

    @property
    def steady_prompt(self) -> float:
        """Prompt tokens of a sweep when as many rows begin as end."""
        return self.sequences * self.mean.prompt.tokens


def sweep_busy(setting: Setting, decoding: float, prompt_tokens: float) -> dict[str, float]:
    """Seconds of each resource of a sweep with that many decoding rows and prompt tokens."""
    mean, cost, choice = setting.mean, setting.cost, setting.choice
    decode = mean.decode.scaled(decoding / mean.decode.decoding) if mean.decode.decoding else Load()
    prompt = mean.prompt.scaled(prompt_tokens / mean.prompt.tokens) if mean.prompt.tokens else Load()
    hidden = {"gpu": choice.hidden.gpu, "cpu": choice.hidden.cpu, "disk": choice.hidden.disk}
    busy: dict[str, float] = defaultdict(float)
    for resource, seconds in cost.weights_s(setting.weights).items():
        busy[resource] += seconds
    for way, share in setting.ways.items():
        for load, goes, count in _parts(setting, way, decode.scaled(share), prompt.scaled(share)):
            for tier, part in hidden.items():
                if part > 0:
                    for resource, seconds in cost.batch_s(load.scaled(1 / count), goes, tier, setting.weights).items():
                        busy[resource] += part * count * seconds
    return {resource: seconds for resource, seconds in busy.items() if seconds > 0}


def _parts(setting: Setting, way: Way, decode: Load, prompt: Load) -> list[tuple[Load, Way, int]]:
    """The loads that share micro-batches, the way of their KV, and how many micro-batches they are."""
    compute = setting.cost.compute
    nothing = Load()
    if mixes(way, compute):
        parts = [(decode, prompt, way)]
    else:
        parts = [(decode, nothing, way), (nothing, prompt, prompt_way(way, compute))]
    return [(old + new, goes, _batches(setting, goes, old, new)) for old, new, goes in parts if (old + new).tokens > 0]


def _batches(setting: Setting, way: Way, decode: Load, prompt: Load) -> int:
    """Micro-batches of a sweep: prompts are not cut where a micro-batch can hold them whole."""
    cut = setting.choice.cut
    if cut.block:
        return max(1, math.ceil((decode.decoding + prompt.readouts) / cut.micro_sequences))
    count = math.ceil((decode.tokens + prompt.tokens) / cut.micro_tokens - 1e-9)
    if prompt.readouts:
        length = prompt.tokens / prompt.readouts
        if length <= cut.micro_tokens:
            count = max(count, math.ceil(prompt.readouts / (cut.micro_tokens // max(1.0, length)) - 1e-9))
    if way in STAGED:
        pages = decode.decoding * setting.mean.pages + prompt.dirty
        count = max(count, math.ceil(pages / cut.staged_pages))
    return max(1, count)


def sweep_seconds(setting: Setting, decoding: float, prompt_tokens: float) -> float:
    """Seconds of such a sweep: of its busiest resource, or of all in turn without overlap."""
    busy = sweep_busy(setting, decoding, prompt_tokens).values()
    return max(busy, default=0.0) if setting.overlap else sum(busy)


def steady_seconds(setting: Setting) -> float:
    """Seconds of a sweep in the steady state."""
    mean = setting.mean
    return sweep_seconds(setting, setting.sequences * mean.decode.decoding, setting.steady_prompt)


def job_seconds(setting: Setting) -> float:
    """Seconds from the first sweep to the last."""
    if setting.choice.cut.block:
        return _block_seconds(setting)
    mean = setting.mean
    if mean.spread <= _ALIKE:
        between = max(0, math.ceil(mean.rows / setting.sequences) - _WAVES_ALIKE)
        followed = float(mean.rows - between * setting.sequences)
        whole = _followed_seconds(setting, followed)
        wave = whole - _followed_seconds(setting, followed - setting.sequences) if between else 0.0
        return whole + between * wave
    followed = min(float(mean.rows), float(_WAVES * setting.sequences))
    rest = (mean.rows - followed) / setting.sequences * mean.sweeps * _uneven_seconds(setting)
    return rest + _followed_seconds(setting, followed)


def _uneven_seconds(setting: Setting) -> float:
    """Seconds of a steady sweep on average, where as many rows begin as chance will have it (Poisson)."""
    mean = setting.mean
    begun = setting.sequences * mean.prompt.readouts
    if begun > _MANY_BEGIN:
        return steady_seconds(setting)
    decoding = setting.sequences * mean.decode.decoding
    length = mean.prompt.tokens / mean.prompt.readouts
    likely, seconds, left = math.exp(-begun), 0.0, 1.0
    rows = 0
    while left > 1e-3:
        seconds += likely * sweep_seconds(setting, decoding, rows * length)
        left -= likely
        rows += 1
        likely *= begun / rows
    return seconds / (1 - left)


def _block_seconds(setting: Setting) -> float:
    mean = setting.mean
    length = mean.prompt.tokens / mean.prompt.readouts
    seconds = 0.0
    waves, left = divmod(mean.rows, setting.sequences)
    for rows, times in ((setting.sequences, waves), (left, 1 if left else 0)):
        if times:
            openings = math.ceil(rows * length / setting.prompt_tokens)
            opening = openings * sweep_seconds(setting, 0.0, rows * length / openings)
            seconds += times * (opening + (mean.sweeps - 1) * sweep_seconds(setting, rows, 0.0))
    return seconds


def _followed_seconds(setting: Setting, rows: float) -> float:
    """Seconds of a job of ``rows`` rows, followed from stride to stride of the sweeps a row is in flight."""
    mean = setting.mean
    length = mean.prompt.tokens / mean.prompt.readouts
    stride = max(1.0, mean.sweeps / _STRIDES)
    life = max(1, round(mean.sweeps / stride))
    most = min(float(setting.sequences), _in_flight(setting))
    running, waiting, seconds = 0.0, rows, 0.0
    cohorts: deque[float] = deque([0.0] * life, maxlen=life)
    known: dict[tuple[float, float], float] = {}

    def sweep(decoding: float, prompt: float) -> float:
        key = (round(decoding, 2), round(prompt))
        if key not in known:
            known[key] = sweep_seconds(setting, decoding, prompt)
        return known[key]

    while waiting > 1e-6 or running > 1e-6:
        running = max(0.0, running - cohorts[0])
        begun = min(waiting, max(0.0, most - running), stride * setting.prompt_tokens / length)
        taking = min(stride, max(1.0, math.ceil(begun * length / setting.prompt_tokens - 1e-9))) if begun else 0.0
        if taking:
            seconds += taking * sweep(running, begun * length / taking)
        running += begun
        waiting -= begun
        cohorts.append(begun)
        if stride > taking:
            seconds += (stride - taking) * sweep(running, 0.0)
    return seconds


def _in_flight(setting: Setting) -> float:
    """Sequences that the pages hold: at their mean length where prompts come in at the pace of the steady state."""
    mean = setting.mean
    prompt_pages = mean.prompt.dirty / mean.prompt.readouts
    longest = float(setting.choice.cut.longest_pages)
    staggered = setting.prompt_tokens <= 1.5 * setting.steady_prompt
    pages = mean.pages if staggered else max(mean.pages, min(longest, 2 * mean.pages - prompt_pages))
    return max(1.0, (setting.pages - mean.standing) / pages)
