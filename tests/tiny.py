"""Tiny random models of every family, built with transformers, for tests that compare with transformers.

Knows nothing of flexbatch: what it writes is an ordinary Hugging Face folder (without a tokenizer).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

CONFIG_CLASSES = {
    "opt": "OPTConfig",
    "gpt2": "GPT2Config",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
}
FAMILIES = tuple(CONFIG_CLASSES)

_OPT = {
    "vocab_size": 131,
    "hidden_size": 80,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "ffn_dim": 168,
    "word_embed_proj_dim": 80,
    "max_position_embeddings": 256,
}
_GPT2 = {
    "vocab_size": 97,
    "n_embd": 60,
    "n_head": 3,
    "n_layer": 3,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {
    "vocab_size": 149,
    "hidden_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 112,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# Every variant of every family: what differs from the family's base. Old (transformers 4) names for rope: 5 reads both.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "opt": {
        "plain": {},
        "350m": {"hidden_size": 96, "num_attention_heads": 2, "word_embed_proj_dim": 40, "do_layer_norm_before": False},
        "bare": {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "_remove_final_layer_norm": True,
            "tie_word_embeddings": False,
        },
    },
    "gpt2": {
        "plain": {},
        "scaled": {
            "n_embd": 96,
            "n_head": 2,
            "n_inner": 100,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "relu",
            "tie_word_embeddings": False,
        },
        "unscaled": {"scale_attn_weights": False, "reorder_and_upcast_attn": True},
    },
    "llama": {
        "plain": {},
        "tied": {"head_dim": 48, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "hidden_size": 320, "rope_theta": 5000.0},
        "llama3": {"rope_scaling": _LLAMA3_ROPE, "rope_theta": 50000.0, "num_key_value_heads": 1},
        "yarn": {"rope_scaling": _YARN_ROPE, "head_dim": 48, "num_key_value_heads": 4},
    },
    "mistral": {
        "plain": {"sliding_window": 8},
        "full": {"sliding_window": None, "head_dim": 80, "tie_word_embeddings": True},
    },
    "qwen2": {
        "plain": {"tie_word_embeddings": True},
        "sliding": {
            "hidden_size": 96,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    },
    "qwen3": {
        "plain": {"head_dim": 48, "tie_word_embeddings": True},
        "sliding": {
            "head_dim": 20,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    },
}
ALL_VARIANTS = tuple((family, variant) for family in FAMILIES for variant in VARIANTS[family])


def tiny_config(family: str, variant: str = "plain", *, rng: random.Random | None = None) -> dict[str, Any]:
    """Return the settings of one variant; variant ``random`` draws a shape from ``rng``."""
    base = {"opt": _OPT, "gpt2": _GPT2}.get(family, _LLAMA)
    overrides = _random_settings(family, rng or random.Random(0)) if variant == "random" else VARIANTS[family][variant]
    return {**base, **overrides}


def tiny_model(
    family: str,
    variant: str = "plain",
    *,
    seed: int = 0,
    rng: random.Random | None = None,
    settings: Mapping[str, Any] | None = None,
) -> transformers.PreTrainedModel:
    """Return a random fp32 model whose greedy output varies and depends on every weight.

    ``settings`` come on top of the variant's.
    """
    config_class: Any = getattr(transformers, CONFIG_CLASSES[family])
    config = config_class(**{**tiny_config(family, variant, rng=rng), **(settings or {})})
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(family, name, noise))
    return model.float().eval()  # type: ignore[no-any-return]


def tiny_checkpoint(
    path: Path,
    family: str,
    variant: str = "plain",
    *,
    shards: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rng: random.Random | None = None,
) -> Path:
    """Write a random model to the folder ``path`` (config, generation config, safetensors) and return ``path``.

    ``shards`` > 1 writes that many files and an index. ``variant`` is a key of ``VARIANTS[family]``, or ``random``:
    a shape drawn from ``rng``.
    """
    model: Any = tiny_model(family, variant, seed=seed, rng=rng)
    model.to(dtype).save_pretrained(path)
    if shards > 1:
        split(path, shards)
    return path


def load_oracle(path: Path) -> Any:
    """Return transformers' own model of a folder, in fp32 with eager attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").float().eval()


def split(path: Path, shards: int) -> None:
    """Replace ``model.safetensors`` in ``path`` by ``shards`` files and an index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()


def _scaled(family: str, name: str, noise: torch.Tensor) -> torch.Tensor:
    """Scale standard normal ``noise`` for the parameter ``name``: layers must outweigh the residual's token."""
    leaf = name.rsplit(".", 2)[-2] if "." in name else name
    if "norm" in leaf or leaf.startswith("ln_"):
        return (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
    if noise.ndim == 1:
        return 0.2 * noise
    if leaf in ("embed_positions", "wpe"):
        return 1.5 * noise
    if leaf in ("embed_tokens", "wte", "lm_head"):
        return 0.4 * noise
    # GPT-2 stores [in, out]; relu and gelu would otherwise add much the same vector for every token.
    fan_in, gain = (noise.shape[0], 1.0) if family == "gpt2" else (noise.shape[1], 1.0 if family == "opt" else 1.6)
    return noise * (gain / math.sqrt(fan_in))


def _random_settings(family: str, rng: random.Random) -> dict[str, Any]:
    """Draw a shape: sizes that are no powers of two, every switch of the family on or off."""
    # A window of 1 is left out: transformers' cache then keeps everything (it slices from -window + 1, which is 0).
    heads = rng.choice([1, 2, 3, 4, 6])
    head_dim = rng.choice([8, 16, 20, 24, 48, 80])
    layers = rng.randint(1, 4)
    vocab = rng.randint(97, 300)
    inner = rng.randint(30, 200)
    positions = rng.randint(256, 512)
    tied = rng.random() < 0.5
    if family == "opt":
        pre_norm = rng.random() < 0.5
        hidden = heads * head_dim
        return {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "ffn_dim": inner,
            "max_position_embeddings": positions,
            "do_layer_norm_before": pre_norm,
            "word_embed_proj_dim": rng.choice([hidden, rng.randint(16, 60)]),
            "enable_bias": rng.random() < 0.7,
            "layer_norm_elementwise_affine": rng.random() < 0.7,
            "activation_function": rng.choice(["relu", "gelu", "gelu_new"]),
            "_remove_final_layer_norm": rng.random() < 0.3,
            "tie_word_embeddings": tied,
        }
    if family == "gpt2":
        return {
            "vocab_size": vocab,
            "n_embd": heads * head_dim,
            "n_head": heads,
            "n_layer": layers,
            "n_inner": rng.choice([None, inner]),
            "n_positions": positions,
            "activation_function": rng.choice(["gelu_new", "gelu", "relu", "silu"]),
            "scale_attn_weights": rng.random() < 0.7,
            "scale_attn_by_inverse_layer_idx": rng.random() < 0.5,
            "tie_word_embeddings": tied,
        }
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "rope_theta": rng.choice([500.0, 10000.0, 1e6]),
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "hidden_act": rng.choice(["silu", "gelu", "gelu_pytorch_tanh"]),
        "tie_word_embeddings": tied,
        "rope_scaling": rng.choice([None, {"rope_type": "linear", "factor": 3.0}, _LLAMA3_ROPE, _YARN_ROPE]),
    }
    if settings["rope_scaling"] is _YARN_ROPE:
        settings["max_position_embeddings"] = 256  # transformers 4 takes the ratio of the windows for the factor
    if family in ("llama", "mistral", "qwen3"):
        settings["head_dim"] = rng.choice([8, 16, 20, 48, 80])
    if family == "llama":
        settings |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    if family == "mistral":
        settings["sliding_window"] = rng.choice([None, rng.randint(2, 40)])
    if family in ("qwen2", "qwen3"):
        settings["use_sliding_window"] = rng.random() < 0.6
        settings["sliding_window"] = rng.randint(2, 40)
        settings["max_window_layers"] = rng.randint(0, layers)
    if family == "qwen3":
        settings["attention_bias"] = rng.random() < 0.5
    return settings
