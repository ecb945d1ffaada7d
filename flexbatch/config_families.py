"""The supported architectures: the table of each one's own fields, and how their values become a ``ModelShape``.

What all architectures share (base fields, dtype, end of sequence, refusals, warnings) is in ``config_parse``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexbatch.config_fields import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    Field,
    choice,
    flag,
    number,
    refuse,
    whole,
    words,
)
from flexbatch.config_rope import read_rope
from flexbatch.shapes import ModelShape

ACTIVATIONS = (
    "gelu",
    "gelu_fast",
    "gelu_new",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)
"""Names of ``config.json`` that ``kernels.activations`` implements."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table: fields that are implemented, and fields that have no effect on inference.

    ``default_eos``: the class's own end of sequence, for a model that names none anywhere. ``rope``: rotary
    positions, whose fields ``config_rope`` reads.
    """

    family: str
    fields: Mapping[str, Field]
    build: Callable[[Reading], ModelShape]
    irrelevant: frozenset[str]
    default_eos: int | None
    rope: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """A config on its way to a shape: checked values of the table, rotary settings, and what all families share."""

    architecture: str
    family: str
    values: Mapping[str, Any]
    stored_dtype: str
    eos: tuple[int, ...]
    config: Mapping[str, Any]
    warnings: list[str]


def _divide(reading: Reading, whole_name: str, whole_size: int, heads_name: str, heads: int) -> int:
    if whole_size % heads:
        raise refuse(reading.architecture, whole_name, whole_size, f"it must be a multiple of {heads_name} ({heads})")
    return whole_size // heads


def _build_opt(reading: Reading) -> ModelShape:
    v = reading.values
    hidden, heads = v["hidden_size"], v["num_attention_heads"]
    head_dim = _divide(reading, "hidden_size", hidden, "num_attention_heads", heads)
    bias = v["enable_bias"]
    return ModelShape(
        family=reading.family,
        architecture=reading.architecture,
        num_layers=v["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=v["ffn_dim"],
        vocab_size=v["vocab_size"],
        max_positions=v["max_position_embeddings"],
        stored_dtype=reading.stored_dtype,
        tie_embeddings=v["tie_word_embeddings"],
        activation=v["activation_function"],
        norm_eps=1e-5,
        attention_scale=head_dim**-0.5,
        windows=(None,) * v["num_hidden_layers"],
        eos_token_ids=reading.eos,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        pre_norm=v["do_layer_norm_before"],
        final_norm=v["do_layer_norm_before"] and not v["_remove_final_layer_norm"],
        norm_affine=v["layer_norm_elementwise_affine"],
        embed_dim=hidden if v["word_embed_proj_dim"] is None else v["word_embed_proj_dim"],
    )


def _build_gpt2(reading: Reading) -> ModelShape:
    v = reading.values
    hidden, heads = v["n_embd"], v["n_head"]
    head_dim = _divide(reading, "n_embd", hidden, "n_head", heads)
    return ModelShape(
        family=reading.family,
        architecture=reading.architecture,
        num_layers=v["n_layer"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=4 * hidden if v["n_inner"] is None else v["n_inner"],
        vocab_size=v["vocab_size"],
        max_positions=v["n_positions"],
        stored_dtype=reading.stored_dtype,
        tie_embeddings=v["tie_word_embeddings"],
        activation=v["activation_function"],
        norm_eps=v["layer_norm_epsilon"],
        attention_scale=head_dim**-0.5 if v["scale_attn_weights"] else 1.0,
        windows=(None,) * v["n_layer"],
        eos_token_ids=reading.eos,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        scale_by_layer=v["scale_attn_by_inverse_layer_idx"],
    )


def _build_llama_like(reading: Reading) -> ModelShape:
    v = reading.values
    hidden, heads, layers = v["hidden_size"], v["num_attention_heads"], v["num_hidden_layers"]
    kv_heads = heads if v["num_key_value_heads"] is None else v["num_key_value_heads"]
    _divide(reading, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
    head_dim = v["head_dim"]
    if head_dim is None:
        head_dim = _divide(reading, "hidden_size", hidden, "num_attention_heads", heads)
    rope, warnings = read_rope(reading.architecture, reading.config, head_dim, v["max_position_embeddings"])
    reading.warnings.extend(warnings)
    # Qwen2 has no attention_bias field: q, k and v always have one, the output projection never.
    attention_bias = v.get("attention_bias", False)
    return ModelShape(
        family=reading.family,
        architecture=reading.architecture,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=v["intermediate_size"],
        vocab_size=v["vocab_size"],
        max_positions=v["max_position_embeddings"],
        stored_dtype=reading.stored_dtype,
        tie_embeddings=v["tie_word_embeddings"],
        activation=v["hidden_act"],
        norm_eps=v["rms_norm_eps"],
        attention_scale=head_dim**-0.5,
        windows=_windows(reading, layers),
        eos_token_ids=reading.eos,
        rope=rope,
        qkv_bias=attention_bias or reading.family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=v.get("mlp_bias", False),
    )


def _windows(reading: Reading, layers: int) -> tuple[int | None, ...]:
    """Mistral: one window for all layers. Qwen: by ``layer_types``, or from layer ``max_window_layers`` on."""
    v = reading.values
    window: int | None = v.get("sliding_window")
    if "use_sliding_window" not in v:
        return (window,) * layers
    window = window if v["use_sliding_window"] else None
    kinds = v["layer_types"]
    if kinds is None:
        return tuple(window if layer >= v["max_window_layers"] else None for layer in range(layers))
    if len(kinds) != layers:
        raise refuse(reading.architecture, "layer_types", kinds, f"it must have one entry for each of {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise refuse(reading.architecture, "layer_types", kind, "only full and sliding attention are supported")
        if kind == "sliding_attention" and window is None:
            raise refuse(reading.architecture, "layer_types", kind, "it needs use_sliding_window and sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


_LLAMA_LIKE: dict[str, Field] = {
    "vocab_size": whole(1, MAX_VOCAB),
    "hidden_size": whole(1, MAX_WIDTH),
    "intermediate_size": whole(1, MAX_WIDTH),
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "num_attention_heads": whole(1, MAX_WIDTH),
    "num_key_value_heads": whole(1, MAX_WIDTH, None, null=True),
    "head_dim": whole(1, MAX_WIDTH, None, null=True),
    "hidden_act": choice(ACTIVATIONS, "silu"),
    "max_position_embeddings": whole(1, MAX_POSITIONS, 2048),
    "rms_norm_eps": number(0, 1, 1e-6),
    "tie_word_embeddings": flag(False),
}
_QWEN: dict[str, Field] = {
    **_LLAMA_LIKE,
    "max_position_embeddings": whole(1, MAX_POSITIONS, 32768),
    "num_key_value_heads": whole(1, MAX_WIDTH, 32, null=True),
    "use_sliding_window": flag(False),
    "sliding_window": whole(1, MAX_POSITIONS, 4096, null=True),
    "max_window_layers": whole(0, MAX_LAYERS, 28),
    "layer_types": words(),
}

ARCHITECTURES: dict[str, Architecture] = {
    "OPTForCausalLM": Architecture(
        family="opt",
        fields={
            "vocab_size": whole(1, MAX_VOCAB),
            "hidden_size": whole(1, MAX_WIDTH),
            "num_hidden_layers": whole(1, MAX_LAYERS),
            "ffn_dim": whole(1, MAX_WIDTH),
            "num_attention_heads": whole(1, MAX_WIDTH),
            "max_position_embeddings": whole(1, MAX_POSITIONS, 2048),
            "do_layer_norm_before": flag(True),
            "_remove_final_layer_norm": flag(False),
            "word_embed_proj_dim": whole(1, MAX_WIDTH, None, null=True),
            "activation_function": choice(ACTIVATIONS, "relu"),
            "enable_bias": flag(True),
            "layer_norm_elementwise_affine": flag(True),
            "tie_word_embeddings": flag(True),
        },
        build=_build_opt,
        irrelevant=frozenset({"dropout", "activation_dropout", "layerdrop", "init_std"}),
        default_eos=2,
    ),
    "GPT2LMHeadModel": Architecture(
        family="gpt2",
        fields={
            "vocab_size": whole(1, MAX_VOCAB),
            "n_positions": whole(1, MAX_POSITIONS, 1024, aliases=("max_position_embeddings",)),
            "n_embd": whole(1, MAX_WIDTH, aliases=("hidden_size",)),
            "n_layer": whole(1, MAX_LAYERS, aliases=("num_hidden_layers",)),
            "n_head": whole(1, MAX_WIDTH, aliases=("num_attention_heads",)),
            "n_inner": whole(1, MAX_WIDTH, None, null=True),
            "activation_function": choice(ACTIVATIONS, "gelu_new"),
            "layer_norm_epsilon": number(0, 1, 1e-5),
            "scale_attn_weights": flag(True),
            "scale_attn_by_inverse_layer_idx": flag(False),
            "reorder_and_upcast_attn": flag(False),  # fp32 scores, which every attention here computes anyway
            "tie_word_embeddings": flag(True),
        },
        build=_build_gpt2,
        irrelevant=frozenset(
            {
                "resid_pdrop",
                "embd_pdrop",
                "attn_pdrop",
                "summary_type",
                "summary_use_proj",
                "summary_activation",
                "summary_proj_to_labels",
                "summary_first_dropout",
                "n_ctx",
                "gradient_checkpointing",
            }
        ),
        default_eos=50256,
    ),
    "LlamaForCausalLM": Architecture(
        family="llama",
        fields={**_LLAMA_LIKE, "attention_bias": flag(False), "mlp_bias": flag(False)},
        build=_build_llama_like,
        irrelevant=frozenset({"pretraining_tp"}),  # another order of the same sums
        default_eos=2,
        rope=True,
    ),
    "MistralForCausalLM": Architecture(
        family="mistral",
        fields={
            **_LLAMA_LIKE,
            "num_key_value_heads": whole(1, MAX_WIDTH, 8, null=True),
            "max_position_embeddings": whole(1, MAX_POSITIONS, 131072),
            "sliding_window": whole(1, MAX_POSITIONS, 4096, null=True),
        },
        build=_build_llama_like,
        irrelevant=frozenset(),
        default_eos=2,
        rope=True,
    ),
    "Qwen2ForCausalLM": Architecture(
        family="qwen2", fields=_QWEN, build=_build_llama_like, irrelevant=frozenset(), default_eos=None, rope=True
    ),
    "Qwen3ForCausalLM": Architecture(
        family="qwen3",
        fields={**_QWEN, "head_dim": whole(1, MAX_WIDTH, 128), "attention_bias": flag(False)},
        build=_build_llama_like,
        irrelevant=frozenset(),
        default_eos=None,
        rope=True,
    ),
}
