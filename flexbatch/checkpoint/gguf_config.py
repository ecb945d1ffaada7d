"""From a GGUF file's metadata to what its ``config.json`` would say, so that one reader of configurations serves both.

Knows llama.cpp's keys and what they mean for the supported architectures; sizes and ranges are checked where every
``config.json`` is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexbatch.checkpoint.gguf_blocks import dequantize
from flexbatch.checkpoint.gguf_file import GgufFile, GgufTensor
from flexbatch.checkpoint.safetensors import read_bytes
from flexbatch.errors import ModelError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""llama.cpp's name of an architecture to transformers'. Mistral is stored as ``llama``; OPT has no GGUF form."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which frequencies are divided: Llama 3's scaling, written out."""

_PREFIXES = ("general.", "tokenizer.", "split.", "quantize.", "adapter.", "imatrix.")
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NO_TOKEN = 2**32 - 1  # what writers put for a token that does not exist
_MAX_FACTORS = 2**16
# Keys that change a forward pass and are not implemented, with the value at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attention.sliding_window_pattern": (0, 1),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "attention.logit_softcapping": (0.0,),
    "rope.scale_linear": (1.0, 0.0),
    "rope.scaling.attn_factor": (1.0, 0.0),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0, 0.0),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.dimension_sections": (),
    "pooling_type": (0,),
    "nextn_predict_layers": (0,),
}
_READ = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    # Records of how the file was made.
    "rope.scaling.finetuned",
    "tensor_data_layout",
}


@dataclass(frozen=True, slots=True)
class GgufConfig:
    """``config`` is what a ``config.json`` would hold; ``native_dtype`` the 16-bit type for products on a GPU."""

    config: dict[str, Any]
    native_dtype: str
    warnings: tuple[str, ...]


def gguf_config(file: GgufFile) -> GgufConfig:
    """Return the configuration of a GGUF file.

    Raises ModelError, naming the key, on an architecture that is not supported, a key that is missing or of the wrong
    type, and on one that would change the model's results and is not implemented.
    """
    name = file.metadata.get("general.architecture")
    supported = ", ".join(CLASSES)
    if not isinstance(name, str):
        raise ModelError(f"{file.path}: the key general.architecture is missing (supported: {supported})")
    if name not in CLASSES:
        raise ModelError(f"{file.path}: architecture {name[:80]} is not supported in GGUF (supported: {supported})")
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ModelError(
            f"{file.path}: it is one of {parts} parts of a split model: join them with llama-gguf-split --merge"
        )
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: tensor token_embd.weight is missing: the file holds no model")
    keys = _Keys(file, name)
    known = (*_PREFIXES, f"{name}.")
    strangers = tuple(key for key in file.metadata if not key.startswith(known))
    warnings = keys.check() + tuple(f"GGUF: the key {key} is not known; it is ignored" for key in strangers)
    config = _gpt2(keys) if name == "gpt2" else _llama_like(file, keys)
    stored, native = _dtypes(file)
    config |= {
        "architectures": [CLASSES[name]],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": stored,
        "eos_token_id": _ends(file),
    }
    if config.get("sliding_window") is not None:
        config["architectures"] = ["MistralForCausalLM"]
        config.pop("attention_bias", None)
        config.pop("mlp_bias", None)
    return GgufConfig(config, native, warnings)


class _Keys:
    """The keys below the architecture's name."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file = file
        self.architecture = architecture
        prefix = f"{architecture}."
        self._own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}

    def check(self) -> tuple[str, ...]:
        """Refuse what is not implemented; return warnings on what nobody knows."""
        warnings = []
        read = _READ | {"attention.layer_norm_epsilon"} if self.architecture == "gpt2" else _READ
        for key, value in self._own.items():
            if key in read:
                continue
            if key not in _NEUTRAL:
                warnings.append(f"GGUF: the key {self.architecture}.{key} is not known; it is ignored")
            elif not any(_same(value, neutral) for neutral in _NEUTRAL[key]):
                raise self.wrong(key, "is not supported")
        return tuple(warnings)

    def get(self, key: str) -> Any:
        """The value, a float as its shortest single-precision decimal, or None; a list must be the same throughout."""
        value = self._own.get(key)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise self.wrong(key, "differs by layer, which is not supported")
            value = value[0]
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """The value; ModelError where the key is missing."""
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self._file.path}: the key {self.architecture}.{key} is missing")
        return value

    def wrong(self, key: str, reason: str) -> ModelError:
        """The error for a key's value."""
        text = str(self._own.get(key))
        text = text if len(text) <= 80 else text[:77] + "..."
        return ModelError(f"{self._file.path}: {self.architecture}.{key} = {text} {reason}")


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral


def _llama_like(file: GgufFile, keys: _Keys) -> dict[str, Any]:
    hidden, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    head_dim = keys.get("attention.key_length")
    if head_dim is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head_dim = hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if head_dim is not None and keys.get(key) not in (None, head_dim):
            raise keys.wrong(key, f"differs from the size of a head ({head_dim}), which is not supported")
    config = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv"),
        "head_dim": head_dim,
        "num_hidden_layers": keys.need("block_count"),
        "intermediate_size": keys.need("feed_forward_length"),
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": 10000.0 if keys.get("rope.freq_base") is None else keys.get("rope.freq_base"),
        "rope_scaling": _rope_scaling(file, keys, head_dim),
    }
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    if keys.architecture == "qwen2":
        del config["head_dim"]  # transformers' class has no such field
    if keys.architecture == "llama":
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        }
    if keys.architecture == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    window = keys.get("attention.sliding_window")
    if window not in (None, 0):
        if keys.architecture != "llama":
            raise keys.wrong("attention.sliding_window", "is not supported")
        config["sliding_window"] = window
    return config


def _gpt2(keys: _Keys) -> dict[str, Any]:
    if keys.get("attention.head_count_kv") not in (None, keys.need("attention.head_count")):
        raise keys.wrong("attention.head_count_kv", "differs from the number of heads")
    return {
        "n_positions": keys.need("context_length"),
        "n_embd": keys.need("embedding_length"),
        "n_head": keys.need("attention.head_count"),
        "n_layer": keys.need("block_count"),
        "n_inner": keys.get("feed_forward_length"),
        "layer_norm_epsilon": keys.need("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _rope_scaling(file: GgufFile, keys: _Keys, head_dim: int) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type")
    if kind not in (None, "none", "linear", "yarn"):
        raise keys.wrong("rope.scaling.type", "is not supported (supported: none, linear, yarn)")
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is not None:
        if kind in ("linear", "yarn"):
            raise keys.wrong("rope.scaling.type", f"cannot be combined with the tensor {ROPE_FACTORS}")
        base = keys.get("rope.freq_base")
        return _llama3(file, tensor, 10000.0 if base is None else base, head_dim)
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.need("rope.scaling.factor")}
    if kind == "yarn":
        original = keys.need("rope.scaling.original_context_length")
        factor = keys.need("rope.scaling.factor")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return None


def _llama3(file: GgufFile, tensor: GgufTensor, base: Any, head_dim: Any) -> dict[str, Any] | None:
    """Find the settings of Llama 3's scaling that give the stored factors; ModelError where none do.

    The stretch of low frequencies is the largest factor; what is left to find is the original window, a power of two.
    """
    if tensor.shape != (head_dim // 2 if isinstance(head_dim, int) else 0,) or tensor.shape[0] > _MAX_FACTORS:
        raise ModelError(f"{file.path}: tensor {ROPE_FACTORS} has shape {list(tensor.shape)}, not half a head")
    raw = read_bytes(file.path, tensor.name, tensor.offset, tensor.nbytes)
    factors = dequantize(raw, tensor.kind, tensor.shape).tolist()
    if all(factor == 1 for factor in factors):
        return None
    stretch = max(factors)
    if isinstance(base, float | int) and base > 1 and math.isfinite(base) and 1 < stretch < 1e6:
        for original in (8192, *(2**power for power in range(3, 24))):
            if _agree(factors, _llama3_factors(base, head_dim, stretch, original)):
                return {
                    "rope_type": "llama3",
                    "factor": stretch,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }
    raise ModelError(f"{file.path}: tensor {ROPE_FACTORS} holds factors that are not Llama 3's, which is not supported")


def _llama3_factors(base: float, head_dim: int, stretch: float, original: int) -> list[float]:
    found = []
    for pair in range(head_dim // 2):
        turns = original / (2 * math.pi * base ** (2 * pair / head_dim))  # in the original window
        if turns > 4:
            found.append(1.0)
        elif turns < 1:
            found.append(stretch)
        else:
            smooth = (turns - 1) / 3
            found.append(1 / ((1 - smooth) / stretch + smooth))
    return found


def _agree(stored: Sequence[float], computed: Sequence[float]) -> bool:
    return all(abs(one - other) <= 1e-4 * other for one, other in zip(stored, computed, strict=True))


def _dtypes(file: GgufFile) -> tuple[str, str]:
    """What the weights are held in, and the 16-bit type nearest to it.

    A quantized value is a product that 16 bits would round, so such files are held in float32, as transformers does;
    so are files of mixed types. Positions (always F32) do not count.
    """
    kinds = {
        tensor.kind for name, tensor in file.tensors.items() if len(tensor.shape) > 1 and name != "position_embd.weight"
    }
    plain = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    if len(kinds) == 1 and not kinds.isdisjoint(plain):
        only = plain[kinds.pop()]
        return only, only
    return "float32", "bfloat16" if "BF16" in kinds and "F16" not in kinds else "float16"


def _ends(file: GgufFile) -> list[int]:
    """The tokens that end a text: end of sequence, of turn, of message; ModelError on one that is no token."""
    vocabulary = file.tensors["token_embd.weight"].shape[0]
    ends = []
    for key in _END_KEYS:
        token = file.metadata.get(f"tokenizer.ggml.{key}")
        if token in (None, _NO_TOKEN):
            continue
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise ModelError(f"{file.path}: tokenizer.ggml.{key} = {str(token)[:40]} is none of {vocabulary} tokens")
        if token not in ends:
            ends.append(token)
    return ends
