"""A machine in figures: capacities, bandwidths and product rates, each with its source. Data; it measures nothing.

The same JSON is written by a measurement of this machine and shipped, from data sheets, for machines that people have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexbatch.errors import UsageError
from flexbatch.units import parse_size

CPU_LINKS = ("disk_read", "disk_write")
GPU_LINKS = ("h2d", "d2h", *CPU_LINKS)
PRODUCT_TYPES = ("float32", "float16", "bfloat16", "float64", "int8")
OPTIONAL_FIGURES = ("elementwise", "packed_attention", "packing")
STORED_TYPES = ("float16", "bfloat16", "float32", "int4")


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate over a number of rows: ``points`` are (rows, rate), rows rising. Constant beyond its ends."""

    points: tuple[tuple[int, float], ...]

    def at(self, rows: float) -> float:
        """The rate at ``rows``, between two points linear in the logarithms."""
        if rows <= self.points[0][0]:
            return self.points[0][1]
        for (low, slow), (high, fast) in zip(self.points, self.points[1:], strict=False):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return math.exp((1 - share) * math.log(slow) + share * math.log(fast))
        return self.points[-1][1]


@dataclass(frozen=True, slots=True)
class Processor:
    """What one processor does a second.

    ``products``: dtype name -> FLOP/s of a linear over the rows of its activations, operands in that dtype and at
    hand. ``widened``: stored dtype -> weights/s that are brought to the compute type before they are used (16 bit to
    fp32 on a CPU; 4 bit: ``int4``). ``attention_bytes``: KV bytes/s that attention of decoding rows reads;
    ``attention_flops``: FLOP/s of attention of prompt tokens. ``loose``: of a CPU, FLOP/s in float32 with weights that
    lie as they are stored, not in the blocks that ``products`` read (None: as fast). ``step_s``: seconds that any Step
    takes at least, ``attend_s``: that attention of a few short rows takes with the store of their keys.
    ``elementwise``: bytes/s that norms, activations and additions between products read and write (0: they take no
    time). ``packed_attention``: KV numbers/s that attention of decoding rows reads in 4 bits; ``packing``: KV numbers/s
    that are brought to 4 bits. 0: not measured; one is read as fast as in 16 bits, and packed as fast as it is read.
    """

    products: Mapping[str, Curve]
    widened: Mapping[str, float]
    attention_bytes: float
    attention_flops: float
    step_s: float = 0.0
    loose: Curve | None = None
    attend_s: float = 0.0
    elementwise: float = 0.0
    packed_attention: float = 0.0
    packing: float = 0.0


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One machine. ``memory``: bytes of every tier it has; ``links``: bytes/s of h2d, d2h, disk_read, disk_write.

    ``gpu`` is None on a machine without one, which has neither a ``gpu`` tier nor the first two links. ``sources`` says
    where figures come from, by their dotted name.
    """

    name: str
    memory: Mapping[str, int]
    links: Mapping[str, float]
    cpu: Processor
    gpu: Processor | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def processor(self, tier: str) -> Processor:
        """The processor of ``tier``, ``gpu`` or ``cpu``."""
        found = self.gpu if tier == "gpu" else self.cpu
        if found is None:
            raise UsageError(f"the hardware profile {self.name} has no GPU: use --device cpu")
        return found

    def to_json(self) -> dict[str, Any]:
        """The object that ``parse_profile`` reads back to an equal profile."""
        found: dict[str, Any] = {"name": self.name, "memory": dict(self.memory), "links": dict(self.links)}
        found["cpu"] = _processor_json(self.cpu)
        if self.gpu is not None:
            found["gpu"] = _processor_json(self.gpu)
        return {**found, "sources": dict(self.sources)}


def parse_profile(value: Any, where: str) -> HardwareProfile:
    """Read a profile's JSON object; ``where`` names its file.

    Bytes may be written as sizes (``"16GiB"``). Raises UsageError, in one line with file, field and what to write,
    for a field that is missing, unknown, of a wrong type or impossible.
    """
    reader = _Reader(where)
    top = reader.members(value, "", ("name", "memory", "links", "cpu"), ("gpu", "sources"))
    if not isinstance(top["name"], str) or not top["name"].strip():
        raise reader.fault("name", "write a name for the machine")
    gpu = None if top.get("gpu") is None else reader.processor(top["gpu"], "gpu")
    tiers = ("cpu", "disk") if gpu is None else ("gpu", "cpu", "disk")
    sizes = reader.members(top["memory"], "memory", tiers)
    rates = reader.members(top["links"], "links", CPU_LINKS if gpu is None else GPU_LINKS)
    sources = top.get("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(text, str) for text in sources.values()):
        raise reader.fault("sources", 'write an object of texts, such as {"links.h2d": "data sheet"}')
    return HardwareProfile(
        name=top["name"],
        memory={tier: reader.size(size, f"memory.{tier}") for tier, size in sizes.items()},
        links={link: reader.rate(rate, f"links.{link}") for link, rate in rates.items()},
        cpu=reader.processor(top["cpu"], "cpu"),
        gpu=gpu,
        sources=dict(sources),
    )


def _processor_json(processor: Processor) -> dict[str, Any]:
    return {
        "products": {dtype: [list(point) for point in curve.points] for dtype, curve in processor.products.items()},
        "widened": dict(processor.widened),
        "attention_bytes": processor.attention_bytes,
        "attention_flops": processor.attention_flops,
        **({"loose": [list(point) for point in processor.loose.points]} if processor.loose else {}),
        "step_s": processor.step_s,
        **({"attend_s": processor.attend_s} if processor.attend_s else {}),
        **{name: rate for name in OPTIONAL_FIGURES if (rate := getattr(processor, name))},
    }


class _Reader:
    """Checks parts of the profile in the file ``where``."""

    def __init__(self, where: str) -> None:
        self._where = where

    def fault(self, name: str, advice: str) -> UsageError:
        """The one line about the field ``name``."""
        return UsageError(f"hardware profile {self._where}: {name}: {advice}".replace(": : ", ": "))

    def members(self, value: Any, name: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
        """The members of an object that has all of ``needed`` and nothing but them and ``optional``."""
        known = ", ".join((*needed, *optional))
        if not isinstance(value, dict):
            raise self.fault(name, f"not an object: write one with {known}" if name else "a profile is a JSON object")
        prefix = f"{name}." if name else ""
        for member in value:
            if member not in needed and member not in optional:
                raise self.fault(f"{prefix}{member}", f"unknown: remove it; known here are {known}")
        for member in needed:
            if member not in value:
                raise self.fault(f"{prefix}{member}", "missing: add it")
        return value

    def rate(self, value: Any, name: str) -> float:
        """A finite number above 0."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fault(name, f"{_shown(value)} is no rate: write a number a second above 0")
        return float(value)

    def duration(self, value: Any, name: str) -> float:
        """Seconds, 0 or more."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.fault(name, f"{_shown(value)} is no duration: write seconds, 0 or more")
        return float(value)

    def size(self, value: Any, name: str) -> int:
        """Bytes, 0 or more."""
        if isinstance(value, str):
            try:
                return parse_size(value)
            except UsageError as error:
                raise self.fault(name, str(error)) from error
        whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**62
        if not whole or value != int(value):
            raise self.fault(name, f"{_shown(value)} is no size: write whole bytes, or text such as 16GiB")
        return int(value)

    def processor(self, value: Any, name: str) -> Processor:
        """What one processor does a second."""
        needed = ("products", "widened", "attention_bytes", "attention_flops")
        parts = self.members(value, name, needed, ("loose", "step_s", "attend_s", *OPTIONAL_FIGURES))
        products, widened = parts["products"], parts["widened"]
        if not isinstance(products, dict) or not products:
            raise self.fault(f"{name}.products", 'write FLOP/s by type, such as {"float32": [[1, 2e9], [512, 1e11]]}')
        if not isinstance(widened, dict):
            raise self.fault(f"{name}.widened", 'write weights a second by stored type, such as {"float16": 1e9}')
        for kind, given, known in (("products", products, PRODUCT_TYPES), ("widened", widened, STORED_TYPES)):
            for dtype in given:
                if dtype not in known:
                    raise self.fault(f"{name}.{kind}.{dtype}", f"unknown type: use one of {', '.join(known)}")
        return Processor(
            products={dtype: self.curve(points, f"{name}.products.{dtype}") for dtype, points in products.items()},
            widened={dtype: self.rate(rate, f"{name}.widened.{dtype}") for dtype, rate in widened.items()},
            attention_bytes=self.rate(parts["attention_bytes"], f"{name}.attention_bytes"),
            attention_flops=self.rate(parts["attention_flops"], f"{name}.attention_flops"),
            loose=self.curve(parts["loose"], f"{name}.loose") if "loose" in parts else None,
            step_s=self.duration(parts.get("step_s", 0.0), f"{name}.step_s"),
            attend_s=self.duration(parts.get("attend_s", 0.0), f"{name}.attend_s"),
            **{kind: self.rate(parts[kind], f"{name}.{kind}") for kind in OPTIONAL_FIGURES if kind in parts},
        )

    def curve(self, value: Any, name: str) -> Curve:
        """Points (rows, rate), rows rising."""
        advice = "write pairs of rows and FLOP/s with rising rows, such as [[1, 2e9], [512, 1e11]]"
        if not isinstance(value, list) or not value:
            raise self.fault(name, f"{_shown(value)} is no curve: {advice}")
        points: list[tuple[int, float]] = []
        for place, pair in enumerate(value):
            here = f"{name}[{place}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.fault(here, f"{_shown(pair)} is no point: {advice}")
            rows, rate = pair
            if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
                raise self.fault(here, f"{_shown(rows)} rows: write a whole number from 1")
            if points and rows <= points[-1][0]:
                raise self.fault(here, f"{rows} rows after {points[-1][0]}: {advice}")
            points.append((rows, self.rate(rate, here)))
        return Curve(tuple(points))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
