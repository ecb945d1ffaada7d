"""Qwen2 (``Qwen2ForCausalLM``): Llama with biases on q, k and v alone, and windows on some layers.

All of that comes with the shape, so names and wiring are Llama's; this module knows nothing else.
"""

from __future__ import annotations

from flexbatch.models.llama import LlamaFamily

FAMILY = LlamaFamily()
