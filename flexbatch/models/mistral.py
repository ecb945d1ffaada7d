"""Mistral (``MistralForCausalLM``): Llama with a sliding window on every layer.

All of that comes with the shape, so names and wiring are Llama's; this module knows nothing else.
"""

from __future__ import annotations

from flexbatch.models.llama import LlamaFamily

FAMILY = LlamaFamily()
