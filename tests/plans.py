"""Small Plans for tests of what follows a Plan."""

from __future__ import annotations

from typing import Any

from flexbatch.policy.plan import Plan
from flexbatch.units import Shares


def small_plan(**changes: Any) -> Plan:
    """A CPU plan with small sizes; ``changes`` override its fields."""
    everything_in_ram = Shares(0, 1, 0)
    values: dict[str, Any] = {
        "model": "test",
        "hardware": "cpu",
        "prompt_len": 10.0,
        "gen_len": 10.0,
        "num_requests": 10,
        "weights": everything_in_ram,
        "kv": everything_in_ram,
        "hidden": everything_in_ram,
        "cpu_attention": 1.0,
        "weight_bits": 16,
        "kv_bits": 16,
        "micro_batch_tokens": 16,
        "max_sequences": 8,
        "dtype": "float32",
        "weights_dtype": "float32",
        "page_tokens": 4,
        "kv_pages": {"cpu": 64},
        "prompt_tokens_per_sweep": 32,
        "micro_batch_sequences": 3,
        "logit_rows": 64,
    }
    return Plan(**{**values, **changes})
