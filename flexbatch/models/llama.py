"""Llama (``LlamaForCausalLM``), and the wiring that Mistral and Qwen share with it.

Knows names of weights and the order of operations; biases, windows and rotary scaling come with the shape.
"""

from __future__ import annotations

from torch import Tensor

from flexbatch.kernels.activations import gated
from flexbatch.kernels.norms import rms_norm
from flexbatch.models.spec import GroupSpec, LayerContext, LinearPart, LinearSpec, VectorSpec, WeightTable
from flexbatch.shapes import ModelShape


class LlamaFamily:
    """RMS norm before attention and MLP, rotary positions, gated MLP. ``qk_norm``: q and k are normed per head."""

    def __init__(self, *, qk_norm: bool = False) -> None:
        self._qk_norm = qk_norm

    def table(self, shape: ModelShape) -> WeightTable:
        """Names and shapes of every weight."""
        embedding = VectorSpec("embed_tokens", "embed_tokens.weight", (shape.vocab_size, shape.hidden_size))
        return WeightTable(
            embed=GroupSpec("embed", "model.", vectors=(embedding,)),
            layers=tuple(self._layer(shape, index) for index in range(shape.num_layers)),
            head=GroupSpec(
                "head",
                "",
                linears=(
                    LinearSpec("lm_head", shape.hidden_size, (LinearPart("lm_head", shape.vocab_size),), bias=False),
                ),
                vectors=(VectorSpec("final_norm", "model.norm.weight", (shape.hidden_size,)),),
            ),
            optional_prefix="model.",
            ignored=(r".*\.rotary_emb\.inv_freq",),
            tied=(("lm_head.weight", "model.embed_tokens.weight"),) if shape.tie_embeddings else (),
        )

    def _layer(self, shape: ModelShape, index: int) -> GroupSpec:
        hidden, inner = shape.hidden_size, shape.intermediate_size
        q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        qkv = (
            LinearPart("self_attn.q_proj", q_width),
            LinearPart("self_attn.k_proj", kv_width),
            LinearPart("self_attn.v_proj", kv_width),
        )
        gate_up = (LinearPart("mlp.gate_proj", inner), LinearPart("mlp.up_proj", inner))
        vectors = [
            VectorSpec("attention_norm", "input_layernorm.weight", (hidden,)),
            VectorSpec("mlp_norm", "post_attention_layernorm.weight", (hidden,)),
        ]
        if self._qk_norm:
            vectors.append(VectorSpec("q_norm", "self_attn.q_norm.weight", (shape.head_dim,)))
            vectors.append(VectorSpec("k_norm", "self_attn.k_norm.weight", (shape.head_dim,)))
        return GroupSpec(
            f"layer.{index}",
            f"model.layers.{index}.",
            linears=(
                LinearSpec("qkv", hidden, qkv, bias=shape.qkv_bias),
                LinearSpec("out", q_width, (LinearPart("self_attn.o_proj", hidden),), bias=shape.output_bias),
                LinearSpec("gate_up", hidden, gate_up, bias=shape.mlp_bias),
                LinearSpec("down", inner, (LinearPart("mlp.down_proj", hidden),), bias=shape.mlp_bias),
            ),
            vectors=tuple(vectors),
        )

    def embed(self, ctx: LayerContext, ids: Tensor) -> Tensor:
        """int64 [T] -> hidden states [T, hidden]."""
        return ctx.embedding("embed_tokens", ids)

    def project(self, ctx: LayerContext, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden] -> q [T, heads, head_dim], k and v [T, kv_heads, head_dim]."""
        shape = ctx.shape
        qkv = ctx.linear("qkv", rms_norm(x, ctx.vector("attention_norm"), shape.norm_eps))
        heads = qkv.view(x.shape[0], -1, shape.head_dim)  # [T, heads + 2 * kv_heads, head_dim]
        qk, v = heads.split((shape.num_heads + shape.num_kv_heads, shape.num_kv_heads), dim=1)
        if self._qk_norm:
            q, k = qk.split((shape.num_heads, shape.num_kv_heads), dim=1)
            q = rms_norm(q, ctx.vector("q_norm"), shape.norm_eps)
            k = rms_norm(k, ctx.vector("k_norm"), shape.norm_eps)
            return ctx.rotate(q), ctx.rotate(k), v
        q, k = ctx.rotate(qk).split((shape.num_heads, shape.num_kv_heads), dim=1)
        return q, k, v

    def finish(self, ctx: LayerContext, x: Tensor, attended: Tensor) -> Tensor:
        """[T, hidden], attended [T, heads, head_dim] -> the layer's output [T, hidden]."""
        x = ctx.linear("out", attended.flatten(1)).add_(x)
        gate_up = ctx.linear("gate_up", rms_norm(x, ctx.vector("mlp_norm"), ctx.shape.norm_eps))
        return ctx.linear("down", gated(ctx.shape.activation, gate_up)).add_(x)

    def head(self, ctx: LayerContext, x: Tensor) -> Tensor:
        """[T, hidden] -> logits [T, vocab]."""
        return ctx.linear("lm_head", rms_norm(x, ctx.vector("final_norm"), ctx.shape.norm_eps))


FAMILY = LlamaFamily()
