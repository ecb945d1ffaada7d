"""Sizes, shares and durations as people write them. Pure text in, numbers out, and back."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from flexbatch.errors import UsageError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
}
_SIZE = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*$")


def parse_size(text: str) -> int:
    """Return the bytes that ``16GiB``, ``500MB`` or ``2.5e9`` stand for; raise UsageError on anything else."""
    match = _SIZE.match(text)
    if match is None or match.group(2).lower() not in _FACTORS:
        raise UsageError(f"{text!r} is not a size: write bytes, or a number with a unit such as 16GiB or 500MB")
    value = float(match.group(1)) * _FACTORS[match.group(2).lower()]
    if not math.isfinite(value) or value > 2**62:
        raise UsageError(f"{text!r} is not a size: it is larger than any machine")
    return int(value)


def format_size(size: float) -> str:
    """Return a size in bytes as people read it: ``1.5 GiB``."""
    for unit, factor in (("TiB", 1024**4), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{int(size)} B"


def format_duration(seconds: float) -> str:
    """Return a duration as people read it: ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


@dataclass(frozen=True, slots=True)
class Shares:
    """Fractions of one thing (weights, KV cache, hidden states) on each tier; they sum to 1."""

    gpu: float
    cpu: float
    disk: float

    def __post_init__(self) -> None:
        values = (self.gpu, self.cpu, self.disk)
        if not all(math.isfinite(value) and 0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-6:
            raise UsageError(f"shares must be between 0 and 1 and sum to 1, not {values}")


def parse_shares(text: str, option: str) -> Shares:
    """Return the shares that ``gpu,cpu,disk`` in percent stand for, e.g. ``20,80,0``; UsageError names ``option``."""
    try:
        percent = [float(part) for part in text.split(",")]
    except ValueError:
        percent = []
    if len(percent) != 3 or not all(math.isfinite(value) and 0 <= value <= 100 for value in percent):
        raise UsageError(f"{option} {text}: write three percentages, gpu,cpu,disk, such as 20,80,0")
    if abs(sum(percent) - 100) > 1e-6:
        raise UsageError(f"{option} {text}: the shares sum to {sum(percent):g}, not to 100")
    return Shares(percent[0] / 100, percent[1] / 100, percent[2] / 100)
