"""GPT-2 (``GPT2LMHeadModel``): learned positions, layer norm before attention and MLP, matrices stored [in, out].

Knows names of weights and the order of operations; the scale of attention comes with the shape.
"""

from __future__ import annotations

from torch import Tensor

from flexbatch.kernels.activations import activate
from flexbatch.kernels.norms import layer_norm
from flexbatch.models.spec import GroupSpec, LayerContext, LinearPart, LinearSpec, VectorSpec, WeightTable
from flexbatch.shapes import ModelShape


def _norm(name: str, tensor: str, width: int) -> tuple[VectorSpec, ...]:
    return (
        VectorSpec(f"{name}.weight", f"{tensor}.weight", (width,)),
        VectorSpec(f"{name}.bias", f"{tensor}.bias", (width,)),
    )


def _normed(ctx: LayerContext, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, ctx.vector(f"{name}.weight"), ctx.vector(f"{name}.bias"), ctx.shape.norm_eps)


class GPT2Family:
    """The wiring of GPT-2; q, k and v are one matrix of the checkpoint (``c_attn``)."""

    def table(self, shape: ModelShape) -> WeightTable:
        """Names and shapes of every weight."""
        hidden = shape.hidden_size
        lm_head = LinearSpec("lm_head", hidden, (LinearPart("lm_head", shape.vocab_size),), bias=False)
        return WeightTable(
            embed=GroupSpec(
                "embed",
                "transformer.",
                vectors=(
                    VectorSpec("embed_tokens", "wte.weight", (shape.vocab_size, hidden)),
                    VectorSpec("embed_positions", "wpe.weight", (shape.max_positions, hidden)),
                ),
            ),
            layers=tuple(self._layer(shape, index) for index in range(shape.num_layers)),
            head=GroupSpec("head", "", linears=(lm_head,), vectors=_norm("final_norm", "transformer.ln_f", hidden)),
            optional_prefix="transformer.",
            ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
            tied=(("lm_head.weight", "transformer.wte.weight"),) if shape.tie_embeddings else (),
        )

    def _layer(self, shape: ModelShape, index: int) -> GroupSpec:
        hidden, inner = shape.hidden_size, shape.intermediate_size

        def linear(name: str, module: str, width: int, out: int) -> LinearSpec:
            return LinearSpec(name, width, (LinearPart(module, out),), bias=True, transposed=True)

        return GroupSpec(
            f"layer.{index}",
            f"transformer.h.{index}.",
            linears=(
                linear("qkv", "attn.c_attn", hidden, 3 * hidden),
                linear("out", "attn.c_proj", hidden, hidden),
                linear("up", "mlp.c_fc", hidden, inner),
                linear("down", "mlp.c_proj", inner, hidden),
            ),
            vectors=_norm("attention_norm", "ln_1", hidden) + _norm("mlp_norm", "ln_2", hidden),
        )

    def embed(self, ctx: LayerContext, ids: Tensor) -> Tensor:
        """int64 [T] -> hidden states [T, hidden]."""
        return ctx.embedding("embed_tokens", ids) + ctx.embedding("embed_positions", ctx.positions)

    def project(self, ctx: LayerContext, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden] -> q, k and v [T, heads, head_dim]."""
        qkv = ctx.linear("qkv", _normed(ctx, "attention_norm", x))
        q, k, v = qkv.view(x.shape[0], 3, -1, ctx.shape.head_dim).unbind(1)
        return q, k, v

    def finish(self, ctx: LayerContext, x: Tensor, attended: Tensor) -> Tensor:
        """[T, hidden], attended [T, heads, head_dim] -> the layer's output [T, hidden]."""
        x = x + ctx.linear("out", attended.flatten(1))
        inner = activate(ctx.shape.activation, ctx.linear("up", _normed(ctx, "mlp_norm", x)))
        return x + ctx.linear("down", inner)

    def head(self, ctx: LayerContext, x: Tensor) -> Tensor:
        """[T, hidden] -> logits [T, vocab]."""
        return ctx.linear("lm_head", _normed(ctx, "final_norm", x))


FAMILY = GPT2Family()
