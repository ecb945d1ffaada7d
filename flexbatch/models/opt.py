"""OPT (``OPTForCausalLM``), all sizes: learned positions, and layer norms before or (350m) after attention and MLP.

Knows names of weights and the order of operations; which norms, biases and projections exist comes with the shape.
"""

from __future__ import annotations

from torch import Tensor

from flexbatch.kernels.activations import activate
from flexbatch.kernels.norms import layer_norm
from flexbatch.models.spec import GroupSpec, LayerContext, LinearPart, LinearSpec, VectorSpec, WeightTable
from flexbatch.shapes import ModelShape

POSITION_OFFSET = 2
"""The first two rows of the position table belong to no position (a heritage of fairseq's padding)."""


def _norm(shape: ModelShape, name: str, tensor: str) -> tuple[VectorSpec, ...]:
    if not shape.norm_affine:
        return ()
    return (
        VectorSpec(f"{name}.weight", f"{tensor}.weight", (shape.hidden_size,)),
        VectorSpec(f"{name}.bias", f"{tensor}.bias", (shape.hidden_size,)),
    )


def _normed(ctx: LayerContext, name: str, x: Tensor) -> Tensor:
    affine = ctx.shape.norm_affine
    weight, bias = (ctx.vector(f"{name}.weight"), ctx.vector(f"{name}.bias")) if affine else (None, None)
    return layer_norm(x, weight, bias, ctx.shape.norm_eps)


class OPTFamily:
    """The wiring of OPT; ``project_in`` and ``project_out`` exist where the embedding is narrower (350m)."""

    def table(self, shape: ModelShape) -> WeightTable:
        """Names and shapes of every weight."""
        hidden, narrow = shape.hidden_size, shape.embed_dim
        project_in: tuple[LinearSpec, ...] = ()
        project_out: tuple[LinearSpec, ...] = ()
        if narrow != hidden:
            project_in = (LinearSpec("project_in", narrow, (LinearPart("project_in", hidden),), bias=False),)
            part = LinearPart("model.decoder.project_out", narrow)
            project_out = (LinearSpec("project_out", hidden, (part,), bias=False),)
        lm_head = LinearSpec("lm_head", narrow, (LinearPart("lm_head", shape.vocab_size),), bias=False)
        positions = (shape.max_positions + POSITION_OFFSET, hidden)
        return WeightTable(
            embed=GroupSpec(
                "embed",
                "model.decoder.",
                linears=project_in,
                vectors=(
                    VectorSpec("embed_tokens", "embed_tokens.weight", (shape.vocab_size, narrow)),
                    VectorSpec("embed_positions", "embed_positions.weight", positions),
                ),
            ),
            layers=tuple(self._layer(shape, index) for index in range(shape.num_layers)),
            head=GroupSpec(
                "head",
                "",
                linears=(*project_out, lm_head),
                vectors=_norm(shape, "final_norm", "model.decoder.final_layer_norm") if shape.final_norm else (),
            ),
            optional_prefix="model.",
            ignored=(r"(model\.)?decoder\.version",),
            tied=(("lm_head.weight", "model.decoder.embed_tokens.weight"),) if shape.tie_embeddings else (),
        )

    def _layer(self, shape: ModelShape, index: int) -> GroupSpec:
        hidden, inner = shape.hidden_size, shape.intermediate_size
        qkv = tuple(LinearPart(f"self_attn.{name}_proj", hidden) for name in "qkv")
        return GroupSpec(
            f"layer.{index}",
            f"model.decoder.layers.{index}.",
            linears=(
                LinearSpec("qkv", hidden, qkv, bias=shape.qkv_bias),
                LinearSpec("out", hidden, (LinearPart("self_attn.out_proj", hidden),), bias=shape.output_bias),
                LinearSpec("up", hidden, (LinearPart("fc1", inner),), bias=shape.mlp_bias),
                LinearSpec("down", inner, (LinearPart("fc2", hidden),), bias=shape.mlp_bias),
            ),
            vectors=_norm(shape, "attention_norm", "self_attn_layer_norm")
            + _norm(shape, "mlp_norm", "final_layer_norm"),
        )

    def embed(self, ctx: LayerContext, ids: Tensor) -> Tensor:
        """int64 [T] -> hidden states [T, hidden]."""
        x = ctx.embedding("embed_tokens", ids)
        if ctx.shape.embed_dim != ctx.shape.hidden_size:
            x = ctx.linear("project_in", x)
        return x + ctx.embedding("embed_positions", ctx.positions + POSITION_OFFSET)

    def project(self, ctx: LayerContext, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden] -> q, k and v [T, heads, head_dim]."""
        if ctx.shape.pre_norm:
            x = _normed(ctx, "attention_norm", x)
        q, k, v = ctx.linear("qkv", x).view(x.shape[0], 3, -1, ctx.shape.head_dim).unbind(1)
        return q, k, v

    def finish(self, ctx: LayerContext, x: Tensor, attended: Tensor) -> Tensor:
        """[T, hidden], attended [T, heads, head_dim] -> the layer's output [T, hidden]."""
        pre_norm = ctx.shape.pre_norm
        x = x + ctx.linear("out", attended.flatten(1))
        if not pre_norm:
            x = _normed(ctx, "attention_norm", x)
        inner = ctx.linear("up", _normed(ctx, "mlp_norm", x) if pre_norm else x)
        x = x + ctx.linear("down", activate(ctx.shape.activation, inner))
        return x if pre_norm else _normed(ctx, "mlp_norm", x)

    def head(self, ctx: LayerContext, x: Tensor) -> Tensor:
        """[T, hidden] -> logits [T, vocab]."""
        if ctx.shape.final_norm:
            x = _normed(ctx, "final_norm", x)
        if ctx.shape.embed_dim != ctx.shape.hidden_size:
            x = ctx.linear("project_out", x)
        return ctx.linear("lm_head", x)


FAMILY = OPTFamily()
