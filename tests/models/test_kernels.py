"""Norms, activations and rotary embeddings against transformers' own, and the table's independence of its history."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from flexbatch.config_rope import read_rope
from flexbatch.kernels.activations import ACTIVATIONS, activate
from flexbatch.kernels.norms import layer_norm, rms_norm
from flexbatch.kernels.rotary import RotaryTable, apply_rotary
from tests.tiny import VARIANTS, tiny_config

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation(name: str) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(activate(name, x), ACT2FN[name](x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(5, 40, generator=generator) * 30).to(dtype)
    weight, bias = torch.randn(2, 40, generator=generator).to(dtype)
    oracle: Any = LlamaRMSNorm(40, eps=1e-5)
    oracle.weight.data = weight
    assert torch.equal(rms_norm(x, weight, 1e-5), oracle(x))
    wide = x.double()
    plain = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = plain * weight.double() + bias.double()
    assert torch.allclose(layer_norm(x, weight, bias, 1e-5).double(), expected, atol=8 * torch.finfo(dtype).eps)
    assert torch.allclose(layer_norm(x, None, None, 1e-5).double(), plain, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [*VARIANTS["llama"], "mscale", "original", "ramp"])
def test_rotary_equals_transformers(variant: str, dtype: torch.dtype) -> None:
    changes: dict[str, Any] = {
        "mscale": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.5, "mscale_all_dim": 0.5}},
        "original": {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.25,
            }
        },
        "ramp": {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 20.0,
                "beta_slow": 2.0,
            }
        },
    }
    settings = {**tiny_config("llama"), **changes.get(variant, VARIANTS["llama"].get(variant, {}))}
    config: Any = transformers.LlamaConfig(**settings)
    head_dim: int = config.head_dim
    rope, warnings = read_rope("LlamaForCausalLM", settings, head_dim, settings["max_position_embeddings"])
    assert warnings == ()
    positions = torch.tensor([0, 1, 5, 100, 255])
    q = torch.randn(5, 4, head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q[None].transpose(1, 2), q[None].transpose(1, 2), cos, sin)[0].transpose(1, 2)[0]
    got = apply_rotary(q, *RotaryTable(rope).lookup(positions))
    assert torch.allclose(got.double(), expected.double(), atol=4 * torch.finfo(dtype).eps, rtol=1e-5)
    assert (got - q)[1:].abs().max() > 0.1


def test_table_does_not_depend_on_its_history() -> None:
    rope, _ = read_rope("LlamaForCausalLM", {}, 20, 4096)
    grown, whole = RotaryTable(rope), RotaryTable(rope)
    positions = torch.arange(3000)
    for length in (1, 7, 1025, 3000):
        grown.reserve(length)
    for first, second in zip(grown.lookup(positions), whole.lookup(positions, 3000), strict=True):
        assert torch.equal(first, second)
    empty = whole.lookup(positions[:0])[0]
    assert empty.shape == (0, 10)
