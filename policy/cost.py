"""What every Step of a sweep moves, multiplies and, on a profiled machine, takes: from model shapes alone.

The linear program, the simulator and budgets all count with it. It knows no schedule and chooses nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from flexbatch.errors import UsageError
from flexbatch.policy.footprint import DTYPE_BYTES, ModelSize, UnitSize
from flexbatch.policy.profile import HardwareProfile, Processor
from flexbatch.scheduler.steps import Kind, Resource
from flexbatch.scheduler.sweep import Slice

Product = Literal["embed", "project", "finish", "head"]
Transfer = Literal[
    "gather", "hidden_read", "hidden_up", "hidden_down", "hidden_write", "kv_read", "kv_up", "qkv_down", "attended_up",
    "kv_down", "kv_write",
]  # fmt: skip


Way = Literal["gpu", "cpu", "cpu_up", "disk", "disk_up"]
"""The tier where KV rests; ``_up``: it is brought to the GPU for attention, otherwise the CPU attends to it."""


_LEARNING = {"learn_forward": 4, "learn_backward": 20}
"""Steps of inference whose issuing is as long as that of a Step of finetuning: adapters and gradients are many small
operations (counted in a profile of SmolLM2's layers)."""
_ATTENDED_BACK = 1.5  # five products where forward has two, less what is counted twice already


@dataclass(frozen=True, slots=True)
class Precision:
    """In which type things rest and are multiplied.

    ``dtype``: products, hidden states, and KV unless ``kv_bits`` is 4. ``stored``: layers' weights as they rest
    (``int4``: packed); ``edges``: embedding and head; ``held``: what is not packed in RAM of a run that computes on
    the CPU.
    """

    dtype: str
    stored: str
    edges: str
    held: str
    kv_bits: int = 16


@dataclass(frozen=True, slots=True)
class Load:
    """What a micro-batch asks of one layer (mean over the layers); counts may be means, too.

    ``decoding`` rows have one token and their context cached: they attend to ``keys`` positions. The other tokens
    attend in ``pairs`` of token and position. Where its pages travel, ``filled`` come and ``dirty`` go back.
    ``readouts`` rows of logits are computed at the end.
    """

    tokens: float = 0.0
    decoding: float = 0.0
    keys: float = 0.0
    pairs: float = 0.0
    filled: float = 0.0
    dirty: float = 0.0
    readouts: float = 0.0

    def scaled(self, factor: float) -> Load:
        """``factor`` times as much."""
        return Load(*(factor * getattr(self, name) for name in self.__slots__))

    def __add__(self, other: Load) -> Load:
        return Load(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Weights by group: bytes ``read`` from disk and ``uploaded`` each sweep, weights ``widened`` before a product.

    ``loose``: weights that a CPU multiplies by as they lie, not in blocks. ``gather``: the tier that rows of the token
    embedding come from, if it does not rest where products run.
    """

    read: Mapping[int, float] = field(default_factory=dict)
    uploaded: Mapping[int, float] = field(default_factory=dict)
    widened: Mapping[int, float] = field(default_factory=dict)
    loose: Mapping[int, float] = field(default_factory=dict)
    gather: str | None = None

    def shortened(self, layers: int, kept: int) -> Traffic:
        """For a model of which ``kept`` layers stay: each with what a mean one of the ``layers`` has."""

        def short(by_group: Mapping[int, float]) -> dict[int, float]:
            mean = sum(by_group.get(group, 0.0) for group in range(1, layers + 1)) / layers
            edges = {0: by_group.get(0, 0.0), kept + 1: by_group.get(layers + 1, 0.0)}
            found = {**edges, **dict.fromkeys(range(1, kept + 1), mean)}
            return {group: found[group] for group in sorted(found) if found[group]}

        return Traffic(short(self.read), short(self.uploaded), short(self.widened), short(self.loose), self.gather)


def traffic(
    units: Sequence[UnitSize], tiers: Mapping[str, str], precision: Precision, compute: str, last: int
) -> Traffic:
    """What ``units`` placed on ``tiers`` cause each sweep; ``last`` is the head's group."""
    read: dict[int, float] = defaultdict(float)
    uploaded: dict[int, float] = defaultdict(float)
    widened: dict[int, float] = defaultdict(float)
    loose: dict[int, float] = defaultdict(float)
    gather: str | None = None
    for unit in units:
        tier = tiers[unit.key]
        if unit.table and tier != compute:
            gather = tier
        for group in unit.groups:
            if group == 0 and unit.table:
                continue  # looked up in row by row
            if tier == "disk":
                read[group] += unit.nbytes
            if compute == "gpu" and tier != "gpu":
                uploaded[group] += unit.nbytes
            stored = precision.edges if group in (0, last) else precision.stored
            if compute == "cpu" and tier == "cpu":
                stored = precision.held
            widened[group] += unit.packed if stored == precision.dtype else unit.elements
            if compute == "cpu" and (tier == "disk" or unit.table or unit.packed or stored != precision.dtype):
                loose[group] += unit.elements
    widened = {group: count for group, count in widened.items() if count}
    return Traffic(dict(read), dict(uploaded), widened, dict(loose), gather)


def load_of(slices: Iterable[Slice], page_tokens: int, windows: Mapping[int | None, int]) -> Load:
    """The load of a micro-batch; ``windows``: how many layers have each attention window."""
    tokens = decoding = readouts = filled = dirty = 0
    keys = pairs = 0.0
    layers = sum(windows.values())
    for piece in slices:
        start, stop = piece.start, piece.start + piece.count
        tokens += piece.count
        filled += -(-start // page_tokens)
        dirty += -(-stop // page_tokens) - start // page_tokens
        readouts += piece.samples + piece.score_to - piece.score_from
        for window, count in windows.items():
            if piece.count == 1:
                keys += count / layers * keys_of(stop, page_tokens, window)
            else:
                pairs += count / layers * pairs_of(start, stop, window)
        decoding += piece.count == 1
    return Load(tokens, decoding, keys, pairs, filled, dirty, readouts)


def keys_of(stop: float, page_tokens: int, window: int | None) -> float:
    """Positions that one token behind ``stop - 1`` others reads: whole pages, inside the window."""
    whole = -(-stop // page_tokens) * page_tokens
    return whole if window is None else min(whole, window + page_tokens)


def pairs_of(start: float, stop: float, window: int | None) -> float:
    """Pairs of tokens ``start .. stop - 1`` with the positions that each attends to."""

    def up_to(length: float) -> float:
        if window is None or length <= window:
            return length * (length + 1) / 2
        return window * (window + 1) / 2 + (length - window) * window

    return up_to(stop) - up_to(start)


class Cost:
    """Bytes, FLOPs and seconds of Steps of one model on one machine.

    ``compute``: where products run; ``profile`` may be None if no seconds are asked for.
    """

    def __init__(
        self,
        size: ModelSize,
        precision: Precision,
        profile: HardwareProfile | None,
        *,
        compute: Resource,
        page_tokens: int,
        logit_rows: int,
    ) -> None:
        self.size = size
        self.precision = precision
        self.compute = compute
        self.page_tokens = page_tokens
        self.logit_rows = logit_rows
        self._profile = profile
        width = DTYPE_BYTES[precision.dtype]
        self._row_bytes = size.kv_row_bytes(precision.dtype, precision.kv_bits)
        self.page_bytes = size.kv_page_bytes(page_tokens, precision.dtype, precision.kv_bits)
        self._token_bytes: dict[str, float] = {
            "gather": size.shape.embed_dim * DTYPE_BYTES.get(precision.edges, 2),
            "qkv_down": size.qkv_width * width,
            "attended_up": size.heads_width * width,
            **dict.fromkeys(
                ("hidden_read", "hidden_up", "hidden_down", "hidden_write"), size.shape.hidden_size * width
            ),
        }
        self.windows: dict[int | None, int] = defaultdict(int)
        for window in size.shape.windows:
            self.windows[window] += 1

    def shortened(self, layers: int) -> Cost:
        """The cost of the same model with its first ``layers`` layers only."""
        shape = replace(self.size.shape, num_layers=layers, windows=self.size.shape.windows[:layers])
        groups = (*self.size.groups[: layers + 1], self.size.groups[-1])
        short = Cost(
            ModelSize(shape, groups),
            self.precision,
            self._profile,
            compute=self.compute,
            page_tokens=self.page_tokens,
            logit_rows=self.logit_rows,
        )
        short.windows = self.windows
        return short

    # --- bytes and FLOPs ---------------------------------------------------------------------------------------------

    def moved(self, kind: Transfer, load: Load) -> float:
        """Bytes that a transfer of a micro-batch moves in one layer."""
        if kind in ("kv_read", "kv_up"):
            return load.filled * self.page_bytes
        if kind in ("kv_down", "kv_write"):
            return load.dirty * self.page_bytes
        return load.tokens * self._token_bytes[kind]

    def product_flops(self, kind: Product, group: int, load: Load) -> float:
        """FLOPs (two a multiply-add) of one Step of products."""
        return 2.0 * self.size.matrices(kind, group) * (load.readouts if kind == "head" else load.tokens)

    def attention_flops(self, load: Load) -> float:
        """FLOPs of attention in one layer: queries with keys, and weights with values."""
        return 4.0 * self.size.heads_width * (load.keys + load.pairs)

    def attention_bytes(self, load: Load) -> float:
        """KV bytes that decoding rows read in one layer."""
        return load.keys * self._row_bytes

    # --- seconds -------------------------------------------------------------------------------------------------

    def processor(self, resource: str) -> Processor:
        """The profile's figures of ``gpu`` or ``cpu``."""
        assert self._profile is not None
        return self._profile.processor(resource)

    def link_s(self, resource: str, nbytes: float) -> float:
        """Seconds that ``nbytes`` take on a link or disk; nothing takes none."""
        if nbytes <= 0:
            return 0.0
        assert self._profile is not None
        rate = self._profile.links.get(resource)
        if rate is None:
            raise self._lacks(f"links.{resource}")
        return nbytes / rate

    def product_s(self, kind: Product, group: int, load: Load, weights: Traffic) -> float:
        """Seconds of one Step of products; weights that are to be widened are, once a product.

        All tokens of the load share a product; at the head ``logit_rows`` of them do at most. What lies between
        products counts by the bytes it reads and writes.
        """
        flops = self.product_flops(kind, group, load)
        if flops == 0:
            return 0.0
        rows, passes = load.tokens, 1
        if kind == "head":
            passes = math.ceil(load.readouts / self.logit_rows)
            rows = load.readouts / passes
        whole = max(1, self.size.groups[group].matrices + self.size.groups[group].shared)
        loose = min(1.0, weights.loose.get(group, 0.0) / whole)
        widened = weights.widened.get(group, 0.0) * self.size.matrices(kind, group) / whole
        products = flops * (loose / self.product_rate(rows, loose=True) + (1 - loose) / self.product_rate(rows))
        products += passes * self.widening_s(widened, edge=self.is_edge(group))
        rate = self.processor(self.compute).elementwise
        passing = passes * rows * self.size.passing(kind, group) * DTYPE_BYTES[self.precision.dtype]
        return products + (passing / rate if rate else 0.0)

    def is_edge(self, group: int) -> bool:
        """Whether ``group`` is the embedding or the head."""
        return group in (0, len(self.size.groups) - 1)

    def product_rate(self, rows: float, *, loose: bool = False) -> float:
        """FLOP/s of products over ``rows`` rows, of weights that lie as suits them best, or ``loose``."""
        processor = self.processor(self.compute)
        curve = processor.products.get(self.precision.dtype)
        if loose and processor.loose is not None and self.precision.dtype == "float32":
            curve = processor.loose
        if curve is None:
            raise self._lacks(f"{self.compute}.products.{self.precision.dtype}")
        return curve.at(rows)

    def widening_s(self, elements: float, *, edge: bool = False) -> float:
        """Seconds that bringing ``elements`` weights to the type of the products takes, once."""
        if elements <= 0:
            return 0.0
        stored = self.precision.edges if edge else self.precision.stored
        rate = self.processor(self.compute).widened.get(stored)
        if rate is None:
            raise self._lacks(f"{self.compute}.widened.{stored}")
        return elements / rate

    def attend_s(self, resource: str, load: Load) -> float:
        """Seconds of attention in one layer: decoding rows are bound by the bytes they read or by their FLOPs."""
        processor = self.processor(resource)
        flops = 4.0 * self.size.heads_width
        reading = self.attention_bytes(load) / processor.attention_bytes
        packing = 0.0
        if self.precision.kv_bits == 4:
            numbers = 2.0 * self.size.shape.num_kv_heads * self.size.shape.head_dim
            plain = processor.attention_bytes / DTYPE_BYTES[self.precision.dtype]
            rate = processor.packed_attention or plain
            reading = numbers * load.keys / rate
            packing = numbers * load.tokens / (processor.packing or rate)
        decoding = max(reading, flops * load.keys / processor.attention_flops)
        return packing + decoding + flops * load.pairs / processor.attention_flops

    def step_s(self, resource: str) -> float:
        """Seconds that any Step of ``resource`` takes at least: what issuing it costs."""
        return self.processor(resource).step_s if resource in ("gpu", "cpu") else 0.0

    def seconds(self, kind: Kind, resource: Resource, group: int, load: Load, weights: Traffic) -> float:
        """Seconds of one Step of a micro-batch with ``load``, or of weights (no load needed)."""
        match kind:
            case "read":
                return self.link_s(resource, weights.read.get(group, 0.0))
            case "upload":
                return self.link_s(resource, weights.uploaded.get(group, 0.0))
            case "embed" | "project" | "finish" | "head":
                return self.step_s(resource) + self.product_s(kind, group, load, weights)
            case "attend":
                return max(self.step_s(resource), self.processor(resource).attend_s) + self.attend_s(resource, load)
            case "gather":
                rows = self.moved(kind, load) if weights.gather == "disk" else 0.0
                return self.step_s(resource) + self.link_s("disk_read", rows)
            case "adapter_read" | "adapter_up":
                return 0.0  # the steady state has its adapters in place
            case "input_down" | "input_write" | "input_read" | "input_up":
                return self.link_s(resource, load.tokens * self.size.hidden_token_bytes(self.precision.dtype))
            case "learn_gather":
                return self.seconds("gather", resource, group, load, weights)
            case "learn_embed":
                return self.seconds("embed", resource, group, load, weights)
            case "learn_forward":
                return _LEARNING[kind] * self.step_s(resource) + self.layer_s(resource, group, load, weights)
            case "learn_loss":
                return self.step_s(resource) + 2 * self.product_s("head", group, load, weights)
            case "learn_backward":
                again = 0.0 if self.is_edge(group) else 2 * self.layer_s(resource, group, load, weights)
                return _LEARNING[kind] * self.step_s(resource) + again + _ATTENDED_BACK * self.attend_s(resource, load)
            case _:
                return self.link_s(resource, self.moved(kind, load))

    def layer_s(self, resource: str, group: int, load: Load, weights: Traffic) -> float:
        """Seconds of a layer's products and attention, forward."""
        kinds: tuple[Product, ...] = ("project", "finish")
        products = sum(self.product_s(kind, group, load, weights) for kind in kinds)
        return products + self.attend_s(resource, load)

    def weights_s(self, weights: Traffic) -> dict[str, float]:
        """Seconds a sweep that each resource moves weights."""
        return {
            "disk_read": self.link_s("disk_read", sum(weights.read.values())),
            "h2d": self.link_s("h2d", sum(weights.uploaded.values())),
        }

    def batch_s(self, load: Load, way: Way, hidden: str, weights: Traffic) -> dict[str, float]:
        """Seconds that a micro-batch takes of each resource in a whole sweep.

        ``way``: its KV's; ``hidden``: the tier where its hidden states wait between layers.
        """
        layers, last = self.size.shape.num_layers, len(self.size.groups) - 1
        spent: dict[str, float] = defaultdict(float)
        widened, loose = (
            {**of, 1: sum(of.get(group, 0.0) for group in range(1, last)) / layers}
            for of in (weights.widened, weights.loose)
        )
        mean = Traffic(widened=widened, loose=loose, gather=weights.gather)
        for kind, resource, where in self._batch_steps(way, hidden, weights.gather):
            group, count = {"embed": (0, 1), "layer": (1, layers), "head": (last, 1)}[where]
            spent[resource] += count * self.seconds(kind, resource, group, load, mean)
        return dict(spent)

    def _batch_steps(
        self, way: Way, hidden: str, gather: str | None
    ) -> list[tuple[Kind, Resource, Literal["embed", "layer", "head"]]]:
        """The Steps that the lowering makes of a micro-batch, and in which groups."""
        on_gpu = self.compute == "gpu"
        attends: Resource = "gpu" if on_gpu and way in ("gpu", "cpu_up", "disk_up") else "cpu"
        below = on_gpu and hidden != "gpu"
        ins: list[tuple[Kind, Resource]] = [("hidden_read", "disk_read")] if hidden == "disk" else []
        ins += [("hidden_up", "h2d")] if below else []
        outs: list[tuple[Kind, Resource]] = [("hidden_down", "d2h")] if below else []
        outs += [("hidden_write", "disk_write")] if hidden == "disk" else []
        layer: list[tuple[Kind, Resource]] = [*ins, ("project", self.compute), ("attend", attends)]
        if way in ("cpu_up", "disk_up"):
            layer += [("kv_up", "h2d"), ("kv_down", "d2h")]
        if way in ("disk", "disk_up"):
            layer += [("kv_read", "disk_read"), ("kv_write", "disk_write")]
        if attends != self.compute:
            layer += [("qkv_down", "d2h"), ("attended_up", "h2d")]
        layer += [("finish", self.compute), *outs]
        embed: list[tuple[Kind, Resource]] = [("gather", "cpu")] if gather is not None else []
        embed += [("embed", self.compute), *outs]
        return [
            *((kind, resource, "embed") for kind, resource in embed),
            *((kind, resource, "layer") for kind, resource in layer),
            *((kind, resource, "head") for kind, resource in [*ins, ("head", self.compute)]),
        ]

    def _lacks(self, name: str) -> UsageError:
        assert self._profile is not None
        return UsageError(f"hardware profile {self._profile.name}: {name}: missing, and this run needs it: add it")
