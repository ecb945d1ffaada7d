"""Model shapes: what the rest of the program needs to know of a ``config.json``, typed; no torch here.

How a ``config.json`` becomes one is in ``config_parse``; this module knows no field names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base, the rotated width, and the scaling with its parameters.

    ``parameters`` holds what the scaling needs beyond ``factor``: for ``llama3`` ``low_freq_factor``,
    ``high_freq_factor`` and ``original_max_position_embeddings``; for ``yarn`` ``beta_fast``, ``beta_slow``,
    ``truncate``, ``attention_factor`` (by which cos and sin are multiplied) and
    ``original_max_position_embeddings``.
    """

    theta: float
    dim: int
    scaling: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything that a model's configuration fixes. Sizes are counts of elements.

    ``windows`` has one entry a layer: the number of most recent positions (its own included) that a token attends to,
    or None for all. ``embed_dim`` differs from ``hidden_size`` where an input and output projection stand between
    (OPT-350m); 0 stands for ``hidden_size``. ``scale_by_layer``: layer i divides its attention scores by i + 1 (see
    ``scale_of``).
    """

    family: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    stored_dtype: str
    tie_embeddings: bool
    activation: str
    norm_eps: float
    attention_scale: float
    windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    rope: Rope | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    pre_norm: bool = True
    final_norm: bool = True
    norm_affine: bool = True
    embed_dim: int = 0
    scale_by_layer: bool = False

    def __post_init__(self) -> None:
        if self.embed_dim == 0:
            object.__setattr__(self, "embed_dim", self.hidden_size)

    def scale_of(self, layer: int) -> float:
        """Return what layer ``layer`` (from 0) multiplies q.k by before the softmax."""
        return self.attention_scale / (layer + 1) if self.scale_by_layer else self.attention_scale
