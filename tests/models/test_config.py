"""What is read from a ``config.json``: the fields of both generations of transformers, refusals and warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from flexbatch.checkpoint.hub import SHORT_NAMES
from flexbatch.config_families import ACTIVATIONS, ARCHITECTURES
from flexbatch.config_parse import parse_config
from flexbatch.errors import ModelError
from flexbatch.kernels import activations
from tests.tiny import ALL_VARIANTS, CONFIG_CLASSES, VARIANTS, tiny_config

ASSETS = Path(__file__).parent.parent.parent / "flexbatch" / "assets" / "configs"


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    architecture = next(name for name, row in ARCHITECTURES.items() if row.family == family)
    base = {key: value for key, value in tiny_config(family).items() if key not in VARIANTS[family]["plain"]}
    return {"architectures": [architecture], "model_type": family, **base, **changes}


@pytest.mark.parametrize(("family", "variant"), ALL_VARIANTS)
def test_old_and_new_names_mean_the_same(family: str, variant: str) -> None:
    """What transformers writes itself (rope_parameters, layer_types, ...) reads like the old names it was given."""
    old = {**config_of(family), **tiny_config(family, variant)}
    config = getattr(transformers, CONFIG_CLASSES[family])(**tiny_config(family, variant))
    new = {**json.loads(config.to_json_string(use_diff=False)), "architectures": old["architectures"]}
    generation = {"eos_token_id": 2}
    shape, warnings = parse_config(new, generation)
    assert shape == parse_config(old, generation)[0]
    assert warnings == ()


def test_every_field_of_a_shape() -> None:
    shape, warnings = parse_config(
        config_of("opt", torch_dtype="float16", eos_token_id=2), {"eos_token_id": [2, 50118]}
    )
    assert warnings == ()
    assert (shape.family, shape.architecture, shape.num_layers) == ("opt", "OPTForCausalLM", 3)
    assert (shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (80, 4, 4, 20)
    assert (shape.intermediate_size, shape.vocab_size, shape.max_positions) == (168, 131, 256)
    assert (shape.stored_dtype, shape.tie_embeddings, shape.activation) == ("float16", True, "relu")
    assert (shape.norm_eps, shape.attention_scale, shape.windows) == (1e-5, 20**-0.5, (None,) * 3)
    assert (shape.eos_token_ids, shape.rope, shape.embed_dim) == ((2, 50118), None, 80)
    assert shape.qkv_bias
    assert shape.pre_norm
    assert shape.final_norm


def test_scale_by_layer() -> None:
    shape, _ = parse_config(config_of("gpt2", scale_attn_by_inverse_layer_idx=True))
    assert [shape.scale_of(layer) for layer in range(3)] == [20**-0.5, 20**-0.5 / 2, 20**-0.5 / 3]


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mistral", {}, (4096,) * 3),
        ("mistral", {"sliding_window": None}, (None,) * 3),
        ("qwen2", {"sliding_window": 5}, (None,) * 3),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 5)),
        (
            "qwen3",
            {
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (5, None, 5),
        ),
    ],
)
def test_windows(family: str, changes: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert parse_config(config_of(family, **changes))[0].windows == expected


def test_defaults_are_those_of_the_class() -> None:
    """Left-out optional fields mean what transformers' class means by them."""
    for family, class_name in CONFIG_CLASSES.items():
        row = next(row for row in ARCHITECTURES.values() if row.family == family)
        # Switched off, a window is dropped from Qwen's configuration object.
        switch = {"use_sliding_window": True} if class_name.startswith("Qwen") else {}
        defaults = getattr(transformers, class_name)(**switch)
        for name, field in row.fields.items():
            optional = isinstance(field.default, bool | int | float | str)
            if optional and name not in switch and hasattr(defaults, name):
                assert getattr(defaults, name) == field.default, f"{class_name}.{name}"


def test_every_field_of_the_class_is_in_the_table() -> None:
    """No field that transformers' own class writes is unknown here (it would only be a warning)."""
    for family, class_name in CONFIG_CLASSES.items():
        written = getattr(transformers, class_name)().to_dict()
        written |= {"layer_types": None} if "layer_types" in written else {}
        unknown = parse_config({**written, **config_of(family), "dtype": "float16"})[1]
        assert unknown == (), class_name


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("opt", {"hidden_size": 81}, ("hidden_size", "81", "num_attention_heads")),
        ("opt", {"hidden_size": -80}, ("hidden_size", "-80")),
        ("opt", {"hidden_size": 10**12}, ("hidden_size", str(10**12))),
        ("opt", {"hidden_size": "80"}, ("hidden_size", "'80'")),
        ("opt", {"num_hidden_layers": True}, ("num_hidden_layers", "True")),
        ("opt", {"num_hidden_layers": 10**9}, ("num_hidden_layers",)),
        ("opt", {"do_layer_norm_before": 1}, ("do_layer_norm_before", "true or false")),
        ("opt", {"activation_function": "mish"}, ("activation_function", "mish", "relu")),
        ("opt", {"torch_dtype": "float8_e4m3fn"}, ("torch_dtype", "float8_e4m3fn")),
        ("opt", {"is_encoder_decoder": True}, ("is_encoder_decoder", "True")),
        ("opt", {"eos_token_id": "2"}, ("eos_token_id",)),
        ("gpt2", {"add_cross_attention": True}, ("GPT2LMHeadModel", "add_cross_attention")),
        ("gpt2", {"layer_norm_epsilon": float("nan")}, ("layer_norm_epsilon",)),
        ("llama", {"num_key_value_heads": 3}, ("num_attention_heads", "num_key_value_heads")),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq")),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ("dynamic", "LlamaForCausalLM")),
        ("llama", {"rope_scaling": {"type": "longrope"}}, ("longrope",)),
        ("llama", {"rope_scaling": {"type": "linear"}}, ("factor", "missing")),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, ("factor", "'2'")),
        ("llama", {"rope_scaling": [1]}, ("rope_scaling",)),
        ("llama", {"rope_theta": 0}, ("rope_theta",)),
        ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ("llama", {"head_dim": 15}, ("head_dim", "15", "even")),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            ("high_freq_factor",),
        ),
        ("llama", {"model_type": "phi3"}, ("model_type", "phi3")),
        ("mistral", {"sliding_window": 0}, ("sliding_window", "0")),
        ("qwen2", {"layer_types": ["full_attention"]}, ("layer_types",)),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, ("layer_types", "chunked_attention")),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, ("layer_types", "use_sliding_window")),
        (
            "qwen3",
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            ("rope_parameters.full_attention",),
        ),
        ("qwen3", {"per_layer_config": {"0": {"head_dim": 8}}}, ("per_layer_config",)),
    ],
)
def test_refusals(family: str, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(config_of(family, **changes))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


@pytest.mark.parametrize("family", CONFIG_CLASSES)
def test_missing_size_is_named(family: str) -> None:
    config = config_of(family)
    del config["vocab_size"]
    with pytest.raises(ModelError, match="required field vocab_size is missing"):
        parse_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["MambaForCausalLM"]},
        {"architectures": None, "model_type": "mamba"},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
        {},
    ],
)
def test_unknown_architecture_lists_the_supported(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"OPTForCausalLM.*GPT2LMHeadModel.*Qwen3ForCausalLM"):
        parse_config(config)


def test_unknown_field_is_a_warning() -> None:
    shape, warnings = parse_config(config_of("llama", clever_trick=3, rope_interleaved=False, _private=1))
    assert shape == parse_config(config_of("llama"))[0]
    assert warnings == ("config.json: LlamaForCausalLM does not know the field clever_trick; it is ignored",)
    scaling = {"rope_type": "linear", "factor": 2.0, "secret": 1}
    _, warnings = parse_config(config_of("llama", rope_scaling=scaling))
    assert len(warnings) == 1
    assert "rope_scaling.secret" in warnings[0]


def test_end_of_sequence_ids() -> None:
    assert parse_config(config_of("llama", eos_token_id=[5, 3]), {"eos_token_id": 7})[0].eos_token_ids == (3, 5, 7)
    config = config_of("opt")
    assert parse_config(config)[0].eos_token_ids == (2,)  # the class's default
    assert parse_config(config, {})[0].eos_token_ids == ()


def test_activation_names_are_those_implemented() -> None:
    assert set(ACTIVATIONS) == set(activations.ACTIVATIONS)


def test_packaged_configurations() -> None:
    """Each has a short name, reads without a warning, and has the size that its name says."""
    names = {path.parent.name for path in ASSETS.glob("*/config.json")}
    assert names <= set(SHORT_NAMES)
    assert {f"opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")} <= names
    for name in names:
        config = json.loads((ASSETS / name / "config.json").read_text())
        assert parse_config(config)[1] == ()
