"""The Plan: what lives where, in which precision, and how a sweep is cut. Frozen data, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flexbatch.errors import InternalError
from flexbatch.options import Schedule
from flexbatch.units import Shares

TIERS = ("gpu", "cpu", "disk")


@dataclass(frozen=True, slots=True)
class TierMemory:
    """Bytes of one tier by use, and the tier's budget."""

    weights: int = 0
    kv: int = 0
    hidden: int = 0
    adapters: int = 0
    working: int = 0
    budget: int = 0

    @property
    def total(self) -> int:
        """All uses together."""
        return self.weights + self.kv + self.hidden + self.adapters + self.working

    def to_json(self) -> dict[str, int]:
        """The contract's object."""
        parts = {name: getattr(self, name) for name in ("weights", "kv", "hidden", "adapters", "working")}
        return {**parts, "total": self.total, "budget": self.budget}


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run is carried out. ``to_json`` names the public part; the rest says how sweeps are cut.

    ``weights_dtype`` is the type weights are held in while they rest; ``dtype`` the one of products, KV and hidden
    states. ``page_tokens`` tokens share a page; ``kv_pages`` is each tier's number of pages. A sweep takes at most
    ``prompt_tokens_per_sweep`` prompt tokens; a micro-batch has at most ``micro_batch_tokens`` tokens (continuous) or
    ``micro_batch_sequences`` sequences (block). ``logit_rows`` rows of logits exist at a time.
    ``staged_pages``: how many KV pages a micro-batch of that tier may bring along where they have to be moved to be
    attended to. ``gpu_attention``: what a GPU attends to of KV that rests below it: all prompts, and this share of the
    decoding sequences (None: nothing, or everything if ``cpu_attention`` is 0). Weights on their way
    pass through ``host_ring`` and ``gpu_ring`` bytes.
    """

    model: str
    hardware: str
    prompt_len: float
    gen_len: float
    num_requests: int
    weights: Shares
    kv: Shares
    hidden: Shares
    cpu_attention: float
    weight_bits: int
    kv_bits: int
    micro_batch_tokens: int
    max_sequences: int
    dtype: str
    weights_dtype: str
    page_tokens: int
    kv_pages: Mapping[str, int]
    prompt_tokens_per_sweep: int
    micro_batch_sequences: int
    logit_rows: int
    staged_pages: Mapping[str, int] = field(default_factory=dict)
    gpu_attention: float | None = None
    host_ring: int = 0
    gpu_ring: int = 0
    schedule: Schedule = "continuous"
    overlap: bool = True
    memory: Mapping[str, TierMemory] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = (
            self.micro_batch_tokens,
            self.max_sequences,
            self.page_tokens,
            self.prompt_tokens_per_sweep,
            self.micro_batch_sequences,
            self.logit_rows,
        )
        if min(counts) < 1:
            raise InternalError(f"a plan with a size below 1: {self}")

    def to_json(self) -> dict[str, Any]:
        """The contract's plan object: shares are fractions of 1, sizes bytes, times seconds."""
        return {
            "model": self.model,
            "hardware": self.hardware,
            "workload": {
                "prompt_len": self.prompt_len,
                "gen_len": self.gen_len,
                "num_requests": self.num_requests,
            },
            "weights": asdict(self.weights),
            "kv": asdict(self.kv),
            "hidden": asdict(self.hidden),
            "cpu_attention": self.cpu_attention,
            "weight_bits": self.weight_bits,
            "kv_bits": self.kv_bits,
            "micro_batch_tokens": self.micro_batch_tokens,
            "micro_batch_sequences": self.micro_batch_sequences,
            "max_sequences": self.max_sequences,
            "schedule": self.schedule,
            "dtype": self.dtype,
            "weights_dtype": self.weights_dtype,
            "memory": {tier: memory.to_json() for tier, memory in self.memory.items()},
            "predicted": dict(self.predicted),
        }
