"""Bytes and FLOPs of weights, KV cache and working memory, from model shapes alone.

The one source of such numbers: plans, budgets and the run's own accounting all ask here. It allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexbatch.shapes import ModelShape

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
RANGE_SLACK = 136 << 10
"""What rounding to blocks of the disk and reading over a small gap may add to the bytes of a tensor."""
GROUP = 64
"""Elements that share a scale and a minimum in 4 bits."""
PAGE_TOKENS = 64  # a run of 64 keys is long enough for a matrix product and short enough to waste little
KV_TILE_BYTES = 4 << 20
"""Numbers of packed KV that are in fp32 at a time, in bytes, where that does not depend on a context's length."""
GPU_TILE_BYTES = 64 << 20
"""Of weights that a GPU brings to 16 bits at a time: there is no cache to stay in, and every launch costs."""
CALIBRATION_SEQUENCES, CALIBRATION_TOKENS = 3, 256
"""How many sequences the basis of packed KV is found from, and how many tokens each has at most."""
CALIBRATION_DIRECTIONS = 512
"""How many random directions of a layer's output say what its output matrix makes of the errors of values."""
KV_NEAR = 4
"""Newest tokens of a page of packed KV that it keeps two more bits a number of."""
_SCALES = 4  # bytes of a group's 16-bit scale and minimum
_BLOCK = 4096  # bytes that a disk reads and writes at least
_PADDING = 64  # a page of packed KV grows by at most a 64th to fill blocks


def tile_bytes(rows: int) -> int:
    """Weights that a CPU widens or unpacks at a time for a product over ``rows`` rows, in fp32 bytes.

    Few rows: they stay in cache until they are used. With many, products hide that they leave it, and run up to a
    quarter faster for being larger.
    """
    return (32 if rows >= 256 else 8) << 20


def packed_bytes(elements: int) -> int:
    """Bytes of ``elements`` in 4 bits, one row of them: two codes a byte, and each group's scale and minimum."""
    return -(-elements // 2) + _SCALES * -(-elements // GROUP)


def kv_group(head_dim: int) -> int:
    """Numbers of a head that share a scale and a minimum: 64 where that divides the head, else all of them."""
    return GROUP if head_dim % GROUP == 0 else head_dim


def kv_head_bytes(head_dim: int) -> int:
    """Bytes of one token's keys, or values, of one head in 4 bits; ``head_dim`` is even."""
    group = kv_group(head_dim)
    return head_dim // group * (group // 2 + _SCALES)


def kv_near_bytes(head_dim: int) -> int:
    """Bytes of the two bits more, of one token's keys, or values, of one head."""
    return -(-head_dim // 4)


def kv_area_bytes(tokens: int, head_dim: int) -> int:
    """Bytes of the keys, or the values, of one head in a packed page: its rows, and what is kept of the newest."""
    return tokens * kv_head_bytes(head_dim) + KV_NEAR * kv_near_bytes(head_dim)


def packed_page_bytes(tokens: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of a packed page of one layer: whole blocks, where that costs next to nothing."""
    exact = 2 * kv_heads * kv_area_bytes(tokens, head_dim)
    whole = -(-exact // _BLOCK) * _BLOCK
    return whole if whole - exact <= exact // _PADDING else exact


@dataclass(frozen=True, slots=True)
class GroupSize:
    """Elements of the weights that one visit of a sweep needs: matrices of its linears, and small tensors.

    ``shared``: elements that are stored with another group (a head tied to the embedding).
    """

    name: str
    matrices: int
    vectors: int
    shared: int = 0

    @property
    def elements(self) -> int:
        """What the group itself stores."""
        return self.matrices + self.vectors


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model's shapes with the sizes of its groups: the embedding, every layer, the head."""

    shape: ModelShape
    groups: tuple[GroupSize, ...]

    def weight_bytes(self, dtype: str) -> int:
        """All weights, each stored once, in ``dtype``."""
        return sum(group.elements for group in self.groups) * DTYPE_BYTES[dtype]

    @property
    def stored_bytes(self) -> int:
        """Bytes of one weight in the checkpoint."""
        return DTYPE_BYTES[self.shape.stored_dtype]

    def small_bytes(self, dtype: str) -> int:
        """Norms, biases and position tables, which always rest where products run, in ``dtype``."""
        table = self.shape.vocab_size * self.shape.embed_dim
        return sum(group.vectors for group in self.groups) * DTYPE_BYTES[dtype] - table * DTYPE_BYTES[dtype]

    def kv_token_bytes(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        shape = self.shape
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES[dtype]

    def kv_page_bytes(self, tokens: int, dtype: str, bits: int = 16) -> int:
        """A page of one layer, ``tokens`` rows of it."""
        if bits == 4:
            return packed_page_bytes(tokens, self.shape.num_kv_heads, self.shape.head_dim)
        return tokens * self.kv_row_bytes(dtype)

    def kv_row_bytes(self, dtype: str, bits: int = 16) -> int:
        """Keys and values of one token in one layer; ``bits`` 4 packs each head's, 16 keeps them in ``dtype``."""
        shape = self.shape
        head = kv_head_bytes(shape.head_dim) if bits == 4 else shape.head_dim * DTYPE_BYTES[dtype]
        return 2 * shape.num_kv_heads * head

    @property
    def heads_width(self) -> int:
        """Elements of one token's queries, which is also what attention returns."""
        return self.shape.num_heads * self.shape.head_dim

    @property
    def qkv_width(self) -> int:
        """Elements of one token's queries, keys and values."""
        return self.heads_width + 2 * self.shape.num_kv_heads * self.shape.head_dim

    def matrices(self, kind: Literal["embed", "project", "finish", "head"], group: int) -> int:
        """Elements of the matrices that one such Step of ``group`` multiplies by."""
        if kind == "project":
            return self.shape.hidden_size * self.qkv_width
        found = self.groups[group].matrices + (self.groups[group].shared if kind == "head" else 0)
        return found - self.shape.hidden_size * self.qkv_width if kind == "finish" else found

    def passing(self, kind: Literal["embed", "project", "finish", "head"], group: int) -> int:
        """Numbers that operations between the products of such a Step read and write, for each of its tokens.

        Norms, residuals, the MLP's activation and gate, rotation; at the head the logits' maximum and their sum.
        """
        shape = self.shape
        match kind:
            case "embed":
                return 2 * shape.hidden_size
            case "project":
                return 2 * (shape.hidden_size + self.qkv_width)
            case "head":
                return 2 * shape.hidden_size + 4 * shape.vocab_size
            case "finish":
                mlp = self.matrices("finish", group) // shape.hidden_size - self.heads_width
                inner = 5 if mlp > 2 * shape.intermediate_size else 2  # gated or not
                return 8 * shape.hidden_size + inner * shape.intermediate_size

    def hidden_token_bytes(self, dtype: str) -> int:
        """The hidden state of one token between two layers."""
        return self.shape.hidden_size * DTYPE_BYTES[dtype]

    def working_bytes(
        self, tokens: int, context: int, logit_rows: int, dtype: str, stored: str, kv_bits: int = 16
    ) -> int:
        """Scratch memory of a micro-batch of ``tokens`` tokens whose longest context is ``context``.

        Weights that rest as ``stored`` and are brought to ``dtype`` a tile at a time.
        Inside a layer: the residual, its norm, stacked q/k/v and the attended heads, the MLP's inner states (two of
        them where it is gated), scores of one head block; at the head: ``logit_rows`` rows of logits with a copy.
        """
        shape, size = self.shape, DTYPE_BYTES[dtype]
        if kv_bits == 4:
            tokens = max(tokens, CALIBRATION_TOKENS)
        heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        layer = tokens * (3 * shape.hidden_size + 3 * heads + 4 * shape.intermediate_size) * size
        scores = 4 * shape.num_heads * max(tokens, 1) * min(context, 512)
        if kv_bits == 4:
            scores += self._packing_bytes(tokens, context)
        else:
            scores += 2 * context * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * size
        logits = 2 * logit_rows * shape.vocab_size * max(size, 4)
        return layer + max(scores, logits) + self.tile_bytes(tokens, dtype, stored)

    def tile_bytes(self, tokens: int, dtype: str, stored: str) -> int:
        """Of weights on their way to ``dtype``, for products over ``tokens`` rows. 4 bits pass through fp32."""
        if stored == dtype:
            return 0
        largest = 4 * max(group.matrices + group.shared for group in self.groups)
        tile = min(largest, tile_bytes(tokens) if dtype == "float32" else GPU_TILE_BYTES)
        if stored != "int4":
            return tile
        return tile + tile // 4 if dtype == "float32" else 3 * tile

    def _packing_bytes(self, tokens: int, context: int) -> int:
        """Scratch memory, in fp32, of packing the keys and values of ``tokens`` and of attending to packed ones.

        Keys and queries turned, and what is attended; tiles; one head's keys and values of a whole context, and what
        is added to them; all that is known of the tokens themselves and of those before each of them.
        Before, what the basis is found from, of two layers, and a layer's output matrix.
        """
        shape = self.shape
        turned = tokens * (3 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * 4
        known = 8 * (1 + KV_NEAR) * tokens * shape.num_kv_heads * 2 * shape.head_dim * 4
        row = 2 * shape.head_dim * 4
        tiles = 8 * min(KV_TILE_BYTES, tokens * shape.num_kv_heads * row) + KV_TILE_BYTES
        chunk = 4 * min(context * shape.num_kv_heads * row, max(KV_TILE_BYTES, context * row))
        seen = 2 * CALIBRATION_SEQUENCES * CALIBRATION_TOKENS * self.qkv_width * 4
        hidden, heads, directions = shape.hidden_size, self.heads_width, CALIBRATION_DIRECTIONS
        output = 4 * (hidden * heads + directions * (hidden + 2 * heads))
        return max(turned + known + tiles + chunk, seen + output)

    def linear_flops(self, tokens: int, logit_rows: int) -> int:
        """Multiply-adds (two FLOPs each) of every matrix product for ``tokens`` tokens, ``logit_rows`` of them read."""
        layers = sum(group.matrices for group in self.groups[1:-1])
        head = self.groups[-1].matrices + self.groups[-1].shared
        return 2 * (layers * tokens + head * logit_rows)

    def attention_flops(self, pairs: int) -> int:
        """Products of ``pairs`` (token, attended token) pairs: q with k, and the weights with v, in every layer."""
        return 4 * self.shape.num_layers * self.shape.num_heads * self.shape.head_dim * pairs


@dataclass(frozen=True, slots=True)
class UnitSize:
    """Weights that are placed as a whole. ``groups``: the visits of a sweep that need them.

    ``nbytes`` as stored; ``edge``: embedding or head, not a layer's; ``table``: the embedding group looks rows of it up
    (the head may multiply by it besides). ``packed`` of the ``elements`` are in 4 bits, ``packed_bytes`` of ``nbytes``.
    ``parts``: tensors, or pieces of them, that it consists of.
    """

    key: str
    groups: tuple[int, ...]
    nbytes: int
    elements: int
    edge: bool
    table: bool = False
    packed: int = 0
    packed_bytes: int = 0
    parts: int = 1

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a ring that it takes at most: rounding to blocks and reading over small gaps add to every part."""
        return self.nbytes + self.parts * RANGE_SLACK
