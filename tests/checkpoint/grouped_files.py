"""Tiny GPTQ and AWQ checkpoints with random codes, and the weights they stand for, by the formats' public description.

Knows nothing of flexbatch. Everything is written element by element, so that it can be read against the description.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2},
    "qwen2": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1},
    "gpt2": {"n_embd": 128, "n_head": 4, "n_layer": 1},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256, "num_hidden_layers": 1},
}


def pack_words(codes: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Codes [n, 8 m] -> int32 [n, m]; nibble i of a word holds column ``order[i]`` of its eight."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for word in range(words.shape[1]):
        for nibble in range(8):
            words[:, word] |= codes[:, 8 * word + order[nibble]].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def quantized_linear(
    rng: np.random.Generator, method: str, shape: tuple[int, int], group: int, *, zero_offset: int, index: np.ndarray
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random tensors of one linear ``shape`` [in, out], and its weight [in, out] in fp16."""
    inputs, outputs = shape
    groups = -(-inputs // group)
    codes = rng.integers(0, 16, (inputs, outputs), dtype=np.uint8)
    zeros = rng.integers(0, 16, (groups, outputs), dtype=np.uint8)
    scales = (rng.uniform(0.2, 1.0, (groups, outputs)) / (5 * inputs**0.5)).astype(np.float16)
    weight = np.empty((inputs, outputs), dtype=np.float16)
    for i in range(inputs):
        difference = codes[i].astype(np.int32) - (zeros[index[i]].astype(np.int32) + zero_offset)
        weight[i] = difference.astype(np.float16) * scales[index[i]]
    straight = tuple(range(8))
    if method == "gptq":
        stored = pack_words(codes.T.copy(), straight).T.copy()
        tensors = {"qweight": stored, "qzeros": pack_words(zeros, straight), "g_idx": index.astype(np.int32)}
    else:
        tensors = {"qweight": pack_words(codes, AWQ_ORDER), "qzeros": pack_words(zeros, AWQ_ORDER)}
    parts = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return parts | {"scales": torch.from_numpy(scales)}, torch.from_numpy(weight)


def write_folder(
    path: Path,
    family: str,
    method: str,
    group: int,
    *,
    changes: Mapping[str, Any] | None = None,
    index: np.ndarray | None = None,
    zero_bias: bool = False,
) -> Any:
    """Write a checkpoint; return transformers' model with the weights that it stands for, in fp32.

    ``changes`` of the quantization_config (None: the field is left out); ``index``: the group of each input, of linears
    with as many.
    """
    model: Any = tiny_model(family, settings=SETTINGS[family]).half()
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    quantization = {"quant_method": method, "bits": 4, "group_size": group}
    quantization |= {"desc_act": False, "sym": False} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    quantization |= changes or {}
    config["quantization_config"] = {key: value for key, value in quantization.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    offset = 1 if method == "gptq" and quantization.get("checkpoint_format") != "gptq_v2" else 0
    rng = np.random.default_rng(group)
    tensors = load_file(path / "model.safetensors")
    state = model.state_dict()
    for name in [name for name in tensors if _is_linear(name, tensors[name])]:
        module = name.removesuffix(".weight")
        rows, columns = tensors[name].shape
        shape = (rows, columns) if family == "gpt2" else (columns, rows)
        groups = np.arange(shape[0]) // group if index is None or len(index) != shape[0] else index
        parts, weight = quantized_linear(rng, method, shape, group, zero_offset=offset, index=groups)
        del tensors[name]
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        if zero_bias and f"{module}.bias" not in tensors:
            tensors[f"{module}.bias"] = torch.zeros(shape[1], dtype=torch.float16)
        full = name if name in state else f"transformer.{name}"
        state[full].copy_(weight if family == "gpt2" else weight.t())
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return model.float().eval()


def _is_linear(name: str, tensor: torch.Tensor) -> bool:
    kept = ("embed", "lm_head", "wte", "wpe", "norm", "ln_")
    return name.endswith(".weight") and tensor.ndim == 2 and not any(part in name for part in kept)
