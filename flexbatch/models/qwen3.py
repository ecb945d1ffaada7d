"""Qwen3 (``Qwen3ForCausalLM``): Llama with an RMS norm on every head of q and k before their rotation.

Biases and windows come with the shape; this module knows nothing else.
"""

from __future__ import annotations

from flexbatch.models.llama import LlamaFamily

FAMILY = LlamaFamily(qk_norm=True)
