"""Keys and values in 4 bits: how a page of them lies in bytes, quantize-on-store, and how pages are read again.

A packed page of one layer is uint8 [kv_heads, 2, area]: the keys, or values, of a head are a row for each token, then
two more bits of the numbers of the newest tokens (``kv4_near``), that at offset o in place o modulo their number. A row
is, group after group along head_dim, group / 2 bytes of codes (the lower nibble first), then scale and minimum in fp16,
in the basis of ``kv4_basis``. What is stored of a token depends on its own key, value and position alone. Knows nothing
of sequences or tiers.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from flexbatch.compression.grids import nearest_codes
from flexbatch.compression.groups import LEVELS
from flexbatch.kernels.attention import AttentionBatch, PageBatch, Span, merged_pages
from flexbatch.kernels.cascade import flash
from flexbatch.kernels.kv4_basis import Basis
from flexbatch.kernels.kv4_near import Numbers, fine_of, finer, pack_codes, sharpen, unpack_codes
from flexbatch.kernels.paged import PagedQueries
from flexbatch.policy.footprint import KV_NEAR, KV_TILE_BYTES, kv_group, kv_head_bytes, kv_near_bytes

BACKENDS: dict[str, str] = {"cuda": "flexbatch.kernels.kv4_triton"}
"""Device type -> the module with its kernels, imported when first used (see ``PackedBackend``)."""

_CUTS = (0.0, 0.05, 0.1)
_TOP = LEVELS - 1
_TILE_BYTES = KV_TILE_BYTES  # of fp32 numbers packed or unpacked at a time: they stay in cache
_HEADER = 4  # bytes of a group's scale and minimum
_LARGEST = 65504.0  # in fp16


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """Queries as packed keys want them: ``q`` [T, heads, D] for what is stored, ``means`` for ``turns`` (or None)."""

    q: Tensor
    means: Tensor | None
    turns: Tensor | None
    basis: Basis


class PackedBackend(Protocol):
    """What a module named in ``BACKENDS`` offers."""

    def attend(
        self, out: Tensor, logs: Tensor, queries: PagedQueries, layer: Tensor, meeting: Meeting, scale: float
    ) -> None:
        """Write the attention of ``queries`` to their rows of ``out``, values as they are stored; fp32.

        To ``logs`` [T, heads] the logarithms of the sums.
        """

    def store(self, layer: Tensor, pages: Tensor, offsets: Tensor, keys: Tensor, values: Tensor, basis: Basis) -> None:
        """Quantize keys and values [T, kv_heads, D], in their ``basis``, into ``layer`` at their pages and offsets."""


def pack_rows(x: Tensor, feedback: Tensor) -> Tensor:
    """Quantize [T, kv_heads, D] of any floating type to packed rows uint8 [T, kv_heads, row_bytes].

    ``feedback`` [kv_heads, groups, n / 2, n / 2] as in ``Basis``. A number beyond fp16 counts as fp16's largest; a NaN
    makes its whole group NaN. Scratch memory: a few tiles.
    """
    tokens, heads, dim = x.shape
    half = kv_group(dim) // 2
    rows = torch.empty(tokens, heads * dim // (2 * half), half + _HEADER, dtype=torch.uint8, device=x.device)
    step = max(1, _TILE_BYTES // (4 * heads * dim))
    for start in range(0, tokens, step):
        numbers = x[start : start + step].float().clamp(-_LARGEST, _LARGEST)
        pairs = numbers.reshape(len(numbers), -1, half, 2).permute(3, 1, 0, 2).contiguous()  # [2, groups, n, half]
        codes, pair = _rounded(pairs[0], pairs[1], feedback.view(-1, half, half))
        part = rows[start : start + step].transpose(0, 1)
        part[..., :half] = codes
        part[..., half:] = pair.view(torch.uint8)
    return rows.view(tokens, heads, kv_head_bytes(dim))


def _rounded(even: Tensor, odd: Tensor, feedback: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [groups, n, half], then scale and minimum fp16 [groups, n, 2], of fp32 channels [groups, n, half].

    The range is cut at both ends by every pair of ``_CUTS``; then the least-squares line through (code, number) of the
    best pair is tried. Numbers of the odd channels are those with what the errors of the even ones ask for.
    """
    lowest = torch.minimum(even.amin(-1, keepdim=True), odd.amin(-1, keepdim=True))
    width = torch.maximum(even.amax(-1, keepdim=True), odd.amax(-1, keepdim=True)) - lowest
    best = torch.full_like(lowest, torch.inf)
    scales, minimums = best.clone(), best.clone()  # unless one fits
    candidates = [(low, high) for low in _CUTS for high in _CUTS]
    for turn in range(len(candidates) + 1):
        if turn < len(candidates):
            low, high = candidates[turn]
            scale = (width * ((1 - low - high) / _TOP)).half().float()
            minimum = (lowest + width * low).half().float()
        else:
            scale, minimum = _line(even, *_coded(even, odd, feedback, scales, minimums))
        low_codes, high_codes, target = _coded(even, odd, feedback, scale, minimum)
        wrong = (low_codes * scale + minimum).sub_(even).square_()
        wrong += (high_codes * scale + minimum).sub_(target).square_()
        error = wrong.sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        minimums = torch.where(better, minimum, minimums)
    low_codes, high_codes, _ = _coded(even, odd, feedback, scales, minimums)
    codes = low_codes.to(torch.uint8).bitwise_or_(high_codes.to(torch.uint8).bitwise_left_shift_(4))
    return codes, torch.cat([scales, minimums], -1).half()


def _coded(
    even: Tensor, odd: Tensor, feedback: Tensor, scales: Tensor, minimums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the even channels and of the odd ones, and the numbers that the latter stand for."""
    low = nearest_codes(even, scales, minimums)
    target = torch.baddbmm(odd, (low * scales + minimums).sub_(even), feedback)
    return low, nearest_codes(target, scales, minimums), target


def _line(even: Tensor, low: Tensor, high: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares scale and minimum for given codes; a constant where all codes are the same."""
    count = 2 * low.shape[-1]
    codes = (low + high).sum(-1, keepdim=True)
    squares = (low.square() + high.square()).sum(-1, keepdim=True)
    ours = (even + odd).sum(-1, keepdim=True)
    cross = (low * even + high * odd).sum(-1, keepdim=True)
    spread = count * squares - codes * codes
    flat = spread <= 1e-6 * count * squares
    spread = torch.where(flat, torch.ones_like(spread), spread)
    scale = torch.where(flat, torch.zeros_like(spread), (count * cross - codes * ours) / spread)
    minimum = torch.where(flat, ours / count, (ours * squares - codes * cross) / spread)
    return scale.half().float(), minimum.half().float()


def unpack_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Packed rows uint8 [..., row_bytes], contiguous -> fp32 [..., D]: code * scale + minimum, rounded once."""
    table = rows.view(-1, kv_group(head_dim) // 2 + _HEADER)
    numbers: Tensor
    if rows.device.type == "cpu":
        numbers = torch.ops.quantized.embedding_bag_4bit_unpack(table)
    else:
        half = table.shape[1] - _HEADER
        pair = table[:, half:].contiguous().view(torch.float16).float()
        codes = torch.stack([table[:, :half] & 15, table[:, :half] >> 4], -1).flatten(1)
        numbers = torch.addcmul(pair[:, 1:], codes.float(), pair[:, :1])
    return numbers.view(*rows.shape[:-1], head_dim)


def page_tokens_of(layer: Tensor, head_dim: int) -> int:
    """Tokens of a page of ``layer`` uint8 [pages, kv_heads, 2, area]."""
    return (layer.shape[3] - KV_NEAR * kv_near_bytes(head_dim)) // kv_head_bytes(head_dim)


def rows_of(layer: Tensor, head_dim: int) -> Tensor:
    """The rows of all tokens of ``layer``, uint8 [pages, kv_heads, 2, P, row_bytes]."""
    row, size = kv_head_bytes(head_dim), page_tokens_of(layer, head_dim)
    found: Tensor = layer[..., : size * row].unflatten(3, (size, row))
    return found


def _near_of(layer: Tensor, head_dim: int) -> Tensor:
    """Where the two bits more are: uint8 [pages, kv_heads, 2, KV_NEAR, D / 4]."""
    found: Tensor = layer[..., page_tokens_of(layer, head_dim) * kv_head_bytes(head_dim) :].unflatten(3, (KV_NEAR, -1))
    return found


def scales_of(rows: Tensor, head_dim: int) -> Tensor:
    """The scale of every number of packed ``rows`` [..., row_bytes], contiguous: fp32 [..., D]."""
    group = kv_group(head_dim)
    table = rows.view(-1, group // 2 + _HEADER)[:, group // 2 : group // 2 + 2].contiguous().view(torch.float16)
    return table.float().expand(-1, group).reshape(*rows.shape[:-1], head_dim)


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """T tokens: keys and values [T, kv_heads, D], and int64 [T] where they go."""

    k: Tensor
    v: Tensor
    pages: Tensor
    offsets: Tensor
    positions: Tensor


def store_packed(layer: Tensor, tokens: Tokens, newest: Tensor, basis: Basis, turns: Tensor | None) -> Numbers:
    """Quantize ``tokens`` into ``layer`` uint8 [pages, kv_heads, 2, area]; what they are then.

    ``newest`` as in ``NearIndex``. ``turns`` fp32 [L, D]: cosines, then sines of the positions below L, or None without
    rotary embedding. A page whose first place is written is cleared before: whatever else it held must not
    reach anybody, not even with the weight 0.
    """
    dim, pages, offsets = tokens.k.shape[2], tokens.pages, tokens.offsets
    keys = basis.stored_keys(tokens.k, tokens.positions, turns)
    values = basis.stored_values(tokens.v, tokens.positions)
    rows = rows_of(layer, dim)
    if keys.device.type in BACKENDS:
        _backend(keys.device.type).store(layer, pages, offsets, keys, values, basis)
        packed = rows[pages, :, :, offsets].contiguous()
    else:
        fresh = pages[offsets == 0]
        if fresh.numel():
            layer.index_fill_(0, fresh, 0)
        packed = torch.stack([pack_rows(keys, basis.key_feedback), pack_rows(values, basis.value_feedback)], 2)
        rows[pages, :, :, offsets] = packed
    exact, coarse, scales = torch.stack([keys, values], 2), unpack_rows(packed, dim), scales_of(packed, dim)
    codes = finer(exact, coarse, scales)
    _near_of(layer, dim)[pages[newest], :, :, offsets[newest] % KV_NEAR] = pack_codes(codes[newest])
    return Numbers(exact, coarse, fine_of(codes, coarse, scales))


def attend_packed(
    batch: AttentionBatch, layer: Tensor, q: Tensor, tokens: Tokens, scale: float, basis: Basis, turns: Tensor | None
) -> Tensor:
    """Store a micro-batch's own keys and values, ``tokens``, and attend causally to all of its sequences'.

    q [T, heads, D]; layer uint8 [pages, kv_heads, 2, area] -> [T, heads, D]. ``turns`` as in ``store_packed``, for
    whole pages. A token's result does not depend on how its prompt was cut: its own key is read as it is, near ones in
    6 bits, all others in 4. Scratch memory on a CPU: a few MB of unpacked pages and a row of D for each page and head;
    for a chunk, one head's keys and values of its context in fp32; that of ``sharpen``.
    """
    near, dim = batch.near, q.shape[2]
    assert near is not None
    codes = _near_of(layer, dim)[near.pages, :, :, near.offsets % KV_NEAR]  # before they are written over
    own = store_packed(layer, tokens, near.newest, basis, turns)
    rows = rows_of(layer, dim)[near.pages, :, :, near.offsets].contiguous()
    coarse = unpack_rows(rows, dim)
    before = Numbers(coarse, coarse, fine_of(unpack_codes(codes, dim), coarse, scales_of(rows, dim)))
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    logs = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if batch.paged:
        queries = basis.meeting(q)
        kernels = _backend(q.device.type)
        meeting = Meeting(queries, None if turns is None else basis.meeting_means(q), turns, basis)
        for part in batch.paged:
            kernels.attend(out, logs, part, layer, meeting, scale)
    else:
        wide = q.float()
        queries = basis.meeting(wide)
        if batch.pages is not None:
            at = batch.pages.rows
            means = None if turns is None else basis.meeting_means(wide[at]) * scale
            out[at], logs[at] = _attend_pages(batch.pages, layer, queries[at] * scale, means, basis, turns)
        for span in batch.spans:
            chunk = slice(span.row, span.row + span.count)
            _attend_chunk(out[chunk], logs[chunk], span, layer, queries[chunk], scale, batch.window, basis, turns)
    sharp = sharpen(out, logs, queries, near, own, before, tokens.positions, scale, basis, turns)
    return basis.attended(sharp).to(q.dtype)


def _attend_chunk(
    out: Tensor,
    logs: Tensor,
    span: Span,
    layer: Tensor,
    q: Tensor,
    scale: float,
    window: int | None,
    basis: Basis,
    turns: Tensor | None,
) -> None:
    """A chunk's queries [n, heads, D]; as many heads at a time as a tile holds of its context, at least one."""
    dim, kv_heads = q.shape[2], layer.shape[1]
    group, size = q.shape[1] // kv_heads, page_tokens_of(layer, dim)
    stop = span.start + span.count
    page = 0 if window is None else max(0, span.start - window + 1) // size
    first = page * size
    ids = torch.tensor(span.pages[page : -(-stop // size)])
    bias: Tensor | None = None
    if span.start > first or (window is not None and stop - first > window):
        queries_at = torch.arange(span.start, stop).unsqueeze(1)
        keys_at = torch.arange(first, stop)
        hidden = keys_at > queries_at
        if window is not None:
            hidden |= keys_at <= queries_at - window
        bias = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    all_rows = rows_of(layer, dim)
    step = max(1, _TILE_BYTES // (len(ids) * 2 * size * dim * 4))
    for head in range(0, kv_heads, step):
        heads = slice(head, min(head + step, kv_heads))
        rows = all_rows[:, heads].index_select(0, ids).permute(2, 1, 0, 3, 4)  # [2, KV, n, P, row_bytes]
        context = unpack_rows(rows.contiguous(), dim).flatten(2, 3)[:, :, : stop - first]  # [2, KV, L, D]
        if turns is not None:
            context[0] += basis.mean_keys(turns[first:stop], heads)
        if first == 0:
            context[0, :, 0] += basis.first_keys[heads]
            context[1, :, 0] += basis.first_values[heads]
        own = slice(heads.start * group, heads.stop * group)
        attended, log = flash(
            q[:, own].transpose(0, 1).unsqueeze(0),
            context[0].unsqueeze(0),
            context[1].unsqueeze(0),
            scale,
            causal=bias is None,
            bias=bias,
        )
        out[:, own] = attended[0].transpose(0, 1)
        logs[:, own] = log[0].transpose(0, 1)


def _attend_pages(
    batch: PageBatch, layer: Tensor, q: Tensor, means: Tensor | None, basis: Basis, turns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of one token each, q and means [B, heads, D] scaled; pages are unpacked a few at a time.

    Attention [B, heads, D], and the logarithms of the sums [B, heads].
    """
    total_rows, heads, dim = q.shape
    rows = rows_of(layer, dim)
    _, kv_heads, _, size, _ = rows.shape
    group, number = heads // kv_heads, batch.owner.shape[0]
    ids = _page_ids(batch)
    padded = torch.cat([q, q.new_zeros(1, heads, dim)])
    padded_means = None if means is None else torch.cat([means, means.new_zeros(1, heads, dim)])
    highest, sums = (q.new_empty(number, kv_heads, group) for _ in range(2))
    partial = q.new_empty(number, kv_heads, group, dim)
    step = max(1, _TILE_BYTES // (kv_heads * 2 * size * dim * 4))
    places = torch.arange(size)
    for start in range(0, number, step):
        part = slice(start, min(start + step, number))
        pages = unpack_rows(rows.index_select(0, ids[part]), dim)  # [n, KV, 2, P, D]
        opening = (batch.first[part] == 0).view(-1, 1, 1)
        pages[:, :, 0, 0] += opening * basis.first_keys
        pages[:, :, 1, 0] += opening * basis.first_values
        pages = pages.flatten(0, 1)
        owner = batch.owner[part]
        scores = torch.bmm(padded.index_select(0, owner).view(-1, group, dim), pages[:, 0].transpose(1, 2))
        if padded_means is not None and turns is not None:
            angles = turns[batch.first[part].unsqueeze(1) + places]  # [n, P, D]
            common = torch.bmm(padded_means.index_select(0, owner), angles.transpose(1, 2))
            scores += common.view(scores.shape)
        scores = scores.view(-1, kv_heads, group, size).add_(batch.bias[part])
        highest[part] = scores.amax(-1)
        weights = scores.sub_(highest[part].unsqueeze(-1)).exp_()
        sums[part] = weights.sum(-1)
        torch.bmm(weights.view(-1, group, size), pages[:, 1], out=partial[part].view(-1, group, dim))
    attended, logs = merged_pages(batch, highest, sums, partial, total_rows)
    return attended.view(total_rows, heads, dim), logs.view(total_rows, heads)


def _page_ids(batch: PageBatch) -> Tensor:
    """The pages in their order in the batch, int64 [N]."""
    if batch.gather is not None:
        return batch.gather
    return torch.cat([torch.arange(first, first + count) for first, _, count in batch.runs])


@functools.cache
def _backend(device_type: str) -> PackedBackend:
    return cast(PackedBackend, importlib.import_module(BACKENDS[device_type]))
