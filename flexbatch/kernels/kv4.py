"""Keys and values in 4 bits: how a page of them lies in bytes, quantize-on-store, and how pages are read again.

A packed page of one layer is uint8 [kv_heads, 2, page_tokens, row_bytes]: the row of a token and head is, group after
group along head_dim, group / 2 bytes of codes (the lower nibble first), then scale and minimum in fp16. Keys are
rotated before they are packed, and so are the queries that meet them. Knows nothing of sequences or tiers.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from flexbatch.compression.grids import nearest_codes, searched_range
from flexbatch.compression.groups import pack_codes
from flexbatch.kernels.attention import AttentionBatch, PageBatch, attend_chunk, merge_pages

GROUP = 64
_CUTS = (0.0, 0.05, 0.1)
_REFINEMENTS = 1
_TILE_BYTES = 4 << 20  # pages unpacked to fp32 at a time: they stay in cache
_HEADER = 4  # bytes of a group's scale and minimum


def group_of(head_dim: int) -> int:
    """The group size along ``head_dim``: 64 where it divides the head, else the whole head."""
    return GROUP if head_dim % GROUP == 0 else head_dim


def row_bytes(head_dim: int) -> int:
    """Bytes of the packed keys, or values, of one token and head; ``head_dim`` is even."""
    group = group_of(head_dim)
    return head_dim // group * (group // 2 + _HEADER)


@functools.cache
def rotation(head_dim: int) -> Tensor:
    """An orthogonal matrix [D, D] that spreads large channels over all: signed Hadamard blocks, as large as fit.

    Keys have a few channels far larger than the others, and a group's step is as large as its largest. Products of
    rotated queries with rotated keys are those of the plain ones (QuaRot, Ashkboos et al., 2024).
    """
    block = head_dim & -head_dim
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.where(torch.rand(block, 1, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    whole: Tensor = torch.block_diag(*[signs * matrix / block**0.5] * (head_dim // block))
    return whole


def rotate(x: Tensor) -> Tensor:
    """Rotate queries or keys [..., D] along the last dimension."""
    return x @ rotation(x.shape[-1]).to(device=x.device, dtype=x.dtype)


def pack_rows(x: Tensor) -> Tensor:
    """Quantize [..., D] of any floating type to packed rows uint8 [..., row_bytes]."""
    group = group_of(x.shape[-1])
    groups = x.float().reshape(-1, group)
    scales, minimums = searched_range(groups, torch.ones_like(groups), torch.float16, _CUTS, _REFINEMENTS)
    pair = torch.cat([scales, minimums], 1).to(torch.float16)
    rows = torch.cat([pack_codes(nearest_codes(groups, scales, minimums)), pair.view(torch.uint8)], 1)
    return rows.view(*x.shape[:-1], row_bytes(x.shape[-1]))


def unpack_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Packed rows uint8 [..., row_bytes], contiguous -> fp32 [..., D]: code * scale + minimum, rounded once."""
    table = rows.view(-1, group_of(head_dim) // 2 + _HEADER)
    numbers: Tensor = torch.ops.quantized.embedding_bag_4bit_unpack(table)
    return numbers.view(*rows.shape[:-1], head_dim)


def store_packed(
    layer: Tensor, pages: Tensor, offsets: Tensor, k: Tensor, v: Tensor, shift: Tensor | None = None
) -> None:
    """Quantize k, v [T, kv_heads, D] into ``layer`` uint8 [pages, kv_heads, 2, P, row_bytes] at (page, offset).

    ``pages`` and ``offsets`` int64 [T]. ``shift``, of a shape that k.shape broadcasts with, is taken from the keys; it
    must be the same for all keys of a sequence, and then changes nothing but the rounding: a number common to all
    scores of a query drops out of its softmax.
    """
    keys = k.float() if shift is None else k.float() - shift
    layer[pages, :, 0, offsets] = pack_rows(rotate(keys))
    layer[pages, :, 1, offsets] = pack_rows(v)


def attend_packed(batch: AttentionBatch, layer: Tensor, q: Tensor, scale: float) -> Tensor:
    """Causal attention on the CPU over packed pages, in which the micro-batch's own keys and values already are.

    q fp32 [T, heads, D]; layer uint8 [pages, kv_heads, 2, P, row_bytes] -> [T, heads, D]. All keys are read as they
    are stored, so a token's result does not depend on how its prompt was cut. Scratch memory: a few MB of unpacked
    pages and one number of D for each page and head; for a chunk, its context in fp32.
    """
    out = torch.empty_like(q)
    dim = q.shape[2]
    queries = rotate(q)
    if batch.pages is not None:
        out[batch.pages.rows] = _attend_pages(batch.pages, layer, queries[batch.pages.rows] * scale)
    for span in batch.spans:
        rows = slice(span.row, span.row + span.count)
        number = -(-(span.start + span.count) // layer.shape[3])
        context = unpack_rows(layer.index_select(0, torch.tensor(span.pages[:number])), dim)  # [n, KV, 2, P, D]
        tokens = context.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, span.start : span.start + span.count]
        here = replace(span, pages=range(number))
        out[rows] = attend_chunk(here, context, queries[rows], tokens[0], tokens[1], scale, batch.window)
    return out


def _attend_pages(batch: PageBatch, layer: Tensor, q: Tensor) -> Tensor:
    """Rows of one token each, q [B, heads, D] rotated and scaled; pages are unpacked a few at a time."""
    total_rows, heads, dim = q.shape
    _, kv_heads, _, size, _ = layer.shape
    group, number = heads // kv_heads, batch.owner.shape[0]
    ids = _page_ids(batch)
    padded = torch.cat([q, q.new_zeros(1, heads, dim)])
    highest, sums = (q.new_empty(number, kv_heads, group) for _ in range(2))
    partial = q.new_empty(number, kv_heads, group, dim)
    step = max(1, _TILE_BYTES // (kv_heads * 2 * size * dim * 4))
    for start in range(0, number, step):
        part = slice(start, min(start + step, number))
        pages = unpack_rows(layer.index_select(0, ids[part]), dim).flatten(0, 1)  # [n * KV, 2, P, D]
        queries = padded.index_select(0, batch.owner[part]).view(-1, group, dim)
        scores = torch.bmm(queries, pages[:, 0].transpose(1, 2)).view(-1, kv_heads, group, size).add_(batch.bias[part])
        highest[part] = scores.amax(-1)
        weights = scores.sub_(highest[part].unsqueeze(-1)).exp_()
        sums[part] = weights.sum(-1)
        torch.bmm(weights.view(-1, group, size), pages[:, 1], out=partial[part].view(-1, group, dim))
    return merge_pages(batch, highest, sums, partial, total_rows).view(total_rows, heads, dim)


def _page_ids(batch: PageBatch) -> Tensor:
    """The pages in their order in the batch, int64 [N]."""
    if batch.gather is not None:
        return batch.gather
    return torch.cat([torch.arange(first, first + count) for first, _, count in batch.runs])
