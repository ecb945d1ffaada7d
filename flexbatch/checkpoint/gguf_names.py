"""llama.cpp's names of tensors to those of the family tables, and how each one is stored differently.

Knows names, llama.cpp's order of rows for rotary positions, and GPT-2's transposed matrices; reads nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

_LLAMA_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_OUTSIDE = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}
_GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_IN_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a stored tensor is to the family's table, and how it differs from it.

    ``heads``: its rows are in llama.cpp's order for that many heads (0: they are in the table's order).
    ``transposed``: the table has it the other way round.
    """

    name: str
    heads: int = 0
    transposed: bool = False

    def as_table(self, tensor: Tensor) -> Tensor:
        """Bring a tensor, as it is stored, to the table's form."""
        if self.heads:
            tensor = table_rows(tensor, self.heads)
        return tensor.t().contiguous() if self.transposed else tensor


def stored_as(architecture: str, name: str, num_heads: int, num_kv_heads: int) -> Stored | None:
    """Return what the stored tensor ``name`` is, or None for a name that llama.cpp's ``architecture`` has not."""
    gpt2 = architecture == "gpt2"
    outside = (_GPT2_OUTSIDE if gpt2 else _LLAMA_OUTSIDE).get(name)
    if outside is not None:
        return Stored(outside)
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return None
    layer, module, field = match.groups()
    found = (_GPT2_LAYER if gpt2 else _LLAMA_LAYER).get(module)
    if found is None:
        return None
    prefix = "transformer.h" if gpt2 else "model.layers"
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}.get(module, 0) if architecture == "llama" else 0
    matrix = gpt2 and field == "weight" and not module.endswith("norm")
    return Stored(f"{prefix}.{layer}.{found}.{field}", heads, matrix)


def table_rows(tensor: Tensor, heads: int) -> Tensor:
    """Bring rows [heads * head_dim, ...] from llama.cpp's order to the table's.

    llama.cpp rotates neighbours (row 2i with 2i + 1 of a head), the table's families a row of the first half with the
    one of the second; so the even rows of a head come first here, then the odd ones.
    """
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
