"""GGUF files of tiny models, written with the package ``gguf`` the way llama.cpp's converter does.

Knows nothing of flexbatch: names come from ``gguf``'s own tables, the order of rows from llama.cpp's description.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

Q = gguf.GGMLQuantizationType

# Widths that are whole blocks of 32; ``WIDE`` of 256, for the types that end in _K.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
    "qwen2": {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True},
    "qwen3": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32},
    "gpt2": {"n_embd": 96, "n_head": 3},
}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 1}


@functools.cache
def _names(architecture: str) -> Any:
    return gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), 4)


def gguf_name(architecture: str, name: str) -> str:
    """llama.cpp's name of a tensor of transformers."""
    found = _names(architecture).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def as_stored(architecture: str, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Bring a tensor of transformers to the form that llama.cpp stores."""
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.t()
    return tensor


def random_blocks(rng: np.random.Generator, kind: Any, rows: int, width: int) -> np.ndarray:
    """Random bytes that mean finite weights of about 1/16: scales are small, codes arbitrary; uint8 [rows, bytes]."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, width // size, nbytes), dtype=np.uint8)
    places = {Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,), Q.Q4_1: (0, 2), Q.Q5_1: (0, 2)}.get(kind, (0,))
    for place in places:
        scales = rng.uniform(-0.01, 0.01, (rows, width // size, 1)).astype(np.float16)
        blocks[:, :, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def write_model(
    path: Path,
    model: Any,
    architecture: str,
    kinds: Sequence[Any] = (Q.F32,),
    *,
    metadata: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
) -> None:
    """Write a model; its matrices take the ``kinds`` in turn, of which those ending in _K get random blocks.

    ``metadata`` are keys that replace the model's own or come on top.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    write_settings(writer, architecture, config)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        _add(writer, key, value)
    for key, value in (vocabulary or {}).items():
        _add(writer, f"tokenizer.{key}", value)
    rng = np.random.default_rng(0)
    turn = 0
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored = as_stored(architecture, config, name, tensor.float()).contiguous().numpy()
        kind = Q.F32
        if stored.ndim == 2 and "wpe" not in name:
            kind = kinds[turn % len(kinds)]
            turn += 1
        target = name if name == "rope_freqs.weight" else gguf_name(architecture, name)
        if kind in (Q.Q4_K, Q.Q5_K, Q.Q6_K):
            writer.add_tensor(target, random_blocks(rng, kind, *stored.shape), raw_dtype=kind)
        else:
            writer.add_tensor(target, gguf.quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_settings(writer: Any, architecture: str, config: Any) -> None:
    """Write the keys below the architecture's name."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "qwen3" or (
        architecture == "llama" and config.head_dim * config.num_attention_heads != config.hidden_size
    ):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
