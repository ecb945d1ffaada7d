"""Attention of ragged batches over a paged KV cache: batched products over pages, no loop over decoding tokens.

Decoding rows (one token each) are computed together, by a compiled kernel (``kernels.paged_numba``) or, where there is
none, by torch: every page is one small matrix product with the queries of its sequence, and the pages' partial
softmaxes are merged as in FlashAttention (Dao et al., 2022) and its split-K variant.
Pages that several sequences begin with are read once for all of them (``kernels.cascade``).
Prompt chunks go one by one through torch's fused kernel. A device that has kernels of its own (``kernels.paged``) gives
all of it to them. Knows nothing of sequences; it sees index tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as functional
from torch import Tensor

from flexbatch.kernels import native
from flexbatch.kernels.cascade import SharedContext, attend_rest, attend_shared, common_pages, merged
from flexbatch.kernels.kv4_near import NearIndex, near_index
from flexbatch.kernels.paged import PagedQueries, attend_paged, has_kernels, index_queries

_CPU = torch.device("cpu")
_GAP = 2  # up to so many pages of others between two of ours are computed along and dropped: cheaper than a new run
_PAGES_PER_RUN = 3  # runs shorter than this on average are not worth a call each: the pages are gathered instead


@dataclass(frozen=True, slots=True)
class Span:
    """Queries of one sequence: rows ``row .. row + count``, at positions ``start ..``, over its ``pages``.

    The first ``shared`` pages may be other sequences', too, and lie before ``start``; ``skip`` of them are attended to
    together with others.
    """

    row: int
    count: int
    start: int
    pages: Sequence[int]
    shared: int = 0
    skip: int = 0


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Rows of one token each, and the N pages they attend to.

    ``rows`` int64 [B]; ``owner`` int64 [N]: which of the B rows a page belongs to (B: nobody's); ``bias`` [N, 1, 1, P]
    is 0 for visible positions, -inf elsewhere; ``table`` int64 [B, M]: places of a row's pages in N, filled with N.
    The pages are read in place, as ``runs`` (first page of the pool, first place in N, number of pages), or they are
    gathered first: ``gather`` int64 [N]. ``first`` int64 [N]: the position of a page's first place (0: nobody's).
    """

    rows: Tensor
    owner: Tensor
    bias: Tensor
    table: Tensor
    runs: tuple[tuple[int, int, int], ...]
    gather: Tensor | None
    first: Tensor

    def to(self, device: torch.device) -> PageBatch:
        """The same with its tensors on ``device``."""
        return replace(
            self,
            rows=self.rows.to(device, non_blocking=True),
            owner=self.owner.to(device, non_blocking=True),
            bias=self.bias.to(device, non_blocking=True),
            table=self.table.to(device, non_blocking=True),
            gather=None if self.gather is None else self.gather.to(device, non_blocking=True),
            first=self.first.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Everything about one micro-batch that attention needs in every layer with the same window.

    Either ``paged``, for the kernels of a device that has some, or ``spans`` for this module's products, with the
    ``contexts`` that they skip, and rows of one token as ``decoding``, for a compiled kernel, or as ``pages``.
    ``near``: what attention over 4 bits reads more precisely.
    """

    spans: tuple[Span, ...]
    pages: PageBatch | None
    window: int | None
    paged: tuple[PagedQueries, ...] = ()
    contexts: tuple[SharedContext, ...] = ()
    near: NearIndex | None = None
    decoding: PagedQueries | None = None

    def to(self, device: torch.device) -> AttentionBatch:
        """The same with its tensors on ``device``, copied on its current stream."""
        pages = None if self.pages is None else self.pages.to(device)
        paged = tuple(queries.to(device) for queries in self.paged)
        contexts = tuple(context.to(device) for context in self.contexts)
        near = None if self.near is None else self.near.to(device)
        return replace(self, pages=pages, paged=paged, contexts=contexts, near=near)


def prepare(
    spans: Sequence[Span],
    page_tokens: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device = _CPU,
    *,
    packed: bool = False,
) -> AttentionBatch:
    """Build the index tensors for ``spans``; ``window``: how many recent positions, its own included, a token sees.

    ``packed``: for pages in 4 bits. The tensors are of the form that ``device`` wants, but still on the CPU: ``to``
    takes them there, once a micro-batch.
    """
    contexts: tuple[SharedContext, ...] = ()
    near = near_index(spans, page_tokens, window) if packed else None
    if window is None and not has_kernels(device):
        contexts, spans = _contexts(spans)
    singles = [span for span in spans if span.count == 1]
    chunks = tuple(span for span in spans if span.count > 1)
    if has_kernels(device):
        groups = [group for group in (singles, chunks) if group]
        return AttentionBatch((), None, window, tuple(_paged(group, page_tokens, window) for group in groups), (), near)
    if singles and not packed and native.usable(dtype):
        queries = _paged(singles, page_tokens, window)
        return AttentionBatch(chunks, None, window, contexts=contexts, decoding=queries)
    pages = _page_batch(singles, page_tokens, window, dtype) if singles else None
    return AttentionBatch(chunks, pages, window, contexts=contexts, near=near)


def attend(batch: AttentionBatch, layer: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of a micro-batch, whose own k and v are already stored in ``layer``.

    q [T, heads, D]; k, v [T, kv_heads, D]; layer [pages, kv_heads, 2, P, D] -> [T, heads, D]. Scratch memory: the
    scores of all pages, the gathered pages where they do not lie together, and one chunk's context.
    """
    if batch.paged:
        return attend_paged(batch.paged, layer, q, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logs = (
        q.new_empty(q.shape[:2], dtype=torch.float32) if batch.contexts else None
    )  # of the sums behind what is shared
    if batch.decoding is not None:
        _compiled_kernel()(out, logs, batch.decoding, layer, q, scale)
    if batch.pages is not None:
        out[batch.pages.rows], log = _attend_pages(batch.pages, layer, q[batch.pages.rows], scale)
        if logs is not None:
            logs[batch.pages.rows] = log
    for span in batch.spans:
        rows = slice(span.row, span.row + span.count)
        if span.skip and logs is not None:
            pages = span.pages[span.skip :]
            start = span.start - span.skip * layer.shape[3]
            out[rows], logs[rows] = attend_rest(pages, start, layer, q[rows], k[rows], v[rows], scale)
        else:
            out[rows] = attend_chunk(span, layer, q[rows], k[rows], v[rows], scale, batch.window)
    if logs is not None:
        sharing = torch.cat([context.rows for context in batch.contexts])
        shared, log = attend_shared(batch.contexts, layer, q, scale)
        out[sharing] = merged(out[sharing], logs[sharing], shared, log)
    return out


def attend_chunk(
    span: Span, layer: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """Causal attention of one chunk [n, heads, D]: over its own k and v where it is the first, else over its pages."""
    stop = span.start + span.count
    grouped = q.shape[1] != k.shape[1]
    mask: Tensor | None = None
    if span.start == 0:
        keys, values = k.transpose(0, 1), v.transpose(0, 1)  # [KV, L, D]
        first = 0
    else:
        size = layer.shape[3]
        page = 0 if window is None else max(0, span.start - window + 1) // size
        first = page * size
        pages = torch.tensor(span.pages[page : -(-stop // size)], device=q.device)
        context = layer.index_select(0, pages).permute(2, 1, 0, 3, 4).flatten(2, 3)  # [2, KV, n * P, D]
        keys, values = context[:, :, : stop - first]
    if span.start > 0 or (window is not None and stop > window):
        queries_at = torch.arange(span.start, stop, device=q.device).unsqueeze(1)
        keys_at = torch.arange(first, stop, device=q.device)
        mask = keys_at <= queries_at
        if window is not None:
            mask &= keys_at > queries_at - window
    attended = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return attended[0].transpose(0, 1)


def _contexts(spans: Sequence[Span]) -> tuple[tuple[SharedContext, ...], list[Span]]:
    """What spans begin with alike, and the spans without it."""
    found: list[SharedContext] = []
    rest = list(spans)
    for count, places in common_pages([span.pages for span in spans], [span.shared for span in spans]):
        rows = [torch.arange(spans[place].row, spans[place].row + spans[place].count) for place in places]
        found.append(SharedContext(torch.cat(rows), torch.tensor(spans[places[0]].pages[:count])))
        for place in places:
            rest[place] = replace(rest[place], skip=count)
    return tuple(found), rest


def _attend_pages(batch: PageBatch, layer: Tensor, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    total_rows, heads, dim = q.shape
    kv_heads = layer.shape[1]
    group = heads // kv_heads
    pool = layer if batch.gather is None else layer.index_select(0, batch.gather)
    queries = torch.cat([q, q.new_zeros(1, heads, dim)]).index_select(0, batch.owner)
    queries = queries.view(-1, kv_heads, group, dim)
    bias = batch.bias.expand(-1, 1, group, -1)
    outputs, logs = [], []
    for first, place, count in batch.runs:
        pages = pool[first : first + count]
        ours = slice(place, place + count)
        # The queries of a group of heads stand where a sequence's would: a page is attended to by one token.
        output, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[ours], pages[:, :, 0], pages[:, :, 1], 0.0, False, attn_mask=bias[ours], scale=scale
        )
        outputs.append(output)
        logs.append(log)
    partial, log = _joined(outputs), _joined(logs)  # of one page alone: [N, KV, G, D], and [N, KV, G], log of the sum
    attended, total = merged_pages(batch, log, torch.ones_like(log), partial, total_rows)
    return attended.view(total_rows, heads, dim), total.view(total_rows, heads)


def merged_pages(batch: PageBatch, highest: Tensor, sums: Tensor, partial: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Merge the pages of each row: rescale every page to the row's maximum, add up, divide once.

    highest, sums [N, KV, G] of a page's scores and weights (or the logarithm of its sum, and 1, where partial is
    divided already), partial [N, KV, G, D], all overwritten -> [rows, KV, G, D], and the logarithms of the rows' sums
    [rows, KV, G].
    """
    _, kv_heads, group, dim = partial.shape
    padded = torch.cat([highest, highest.new_full((1, kv_heads, group), -torch.inf)])
    row_highest = torch.cat([padded[batch.table].amax(1), padded.new_zeros(1, kv_heads, group)])
    factor = highest.sub_(row_highest.index_select(0, batch.owner)).exp_()
    total = factor.new_zeros(rows + 1, kv_heads, group).index_add_(0, batch.owner, sums.mul_(factor))
    attended = factor.new_zeros(rows + 1, kv_heads, group, dim)  # logarithms and sums are fp32 beside narrower pages
    attended.index_add_(0, batch.owner, partial.to(factor.dtype).mul_(factor.unsqueeze(-1)))
    merged = attended[:rows].div_(total[:rows].unsqueeze(-1)).to(partial.dtype)
    return merged, row_highest[:rows] + total[:rows].log()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@functools.cache
def _compiled_kernel() -> Callable[[Tensor, Tensor | None, PagedQueries, Tensor, Tensor, float], None]:
    from flexbatch.kernels.paged_numba import attend_decoding  # Numba is there only where it is needed

    return attend_decoding


def _paged(spans: Sequence[Span], page_tokens: int, window: int | None) -> PagedQueries:
    return index_queries(
        rows=[span.row for span in spans],
        starts=[span.start - span.skip * page_tokens for span in spans],
        counts=[span.count for span in spans],
        tables=[span.pages[span.skip :] for span in spans],
        page_tokens=page_tokens,
        window=window,
    )


def _page_batch(singles: Sequence[Span], size: int, window: int | None, dtype: torch.dtype) -> PageBatch:
    owned: list[tuple[int, int, int, int, int]] = []  # page, row, first visible offset, end of those, first position
    for row, span in enumerate(singles):
        stop = span.start + 1
        lowest = 0 if window is None else max(0, stop - window)
        for place in range(max(lowest // size, span.skip), -(-stop // size)):
            base = place * size
            owned.append((span.pages[place], row, max(0, lowest - base), min(size, stop - base), base))
    owned.sort()
    ids = [page for page, *_ in owned]
    runs, places = _runs(ids)
    gather: Tensor | None = None
    if len(set(ids)) < len(ids) or len(runs) * _PAGES_PER_RUN > len(ids) + _PAGES_PER_RUN:
        gather = torch.tensor(ids)
        runs, places = [(0, 0, len(ids))], list(range(len(ids)))
    number = runs[-1][1] + runs[-1][2]

    owner = torch.full((number,), len(singles), dtype=torch.long)
    owner[places] = torch.tensor([row for _, row, *_ in owned])
    begin = torch.zeros(number, dtype=torch.long)
    begin[places] = torch.tensor([low for _, _, low, *_ in owned])
    end = torch.full((number,), size, dtype=torch.long)  # a page that is nobody's stays finite; its result is dropped
    end[places] = torch.tensor([high for _, _, _, high, _ in owned])
    first = torch.zeros(number, dtype=torch.long)
    first[places] = torch.tensor([base for *_, base in owned])
    offsets = torch.arange(size)
    visible = (offsets >= begin.unsqueeze(1)) & (offsets < end.unsqueeze(1))
    bias = torch.zeros(number, size, dtype=dtype).masked_fill_(~visible, -torch.inf)

    per_row: list[list[int]] = [[] for _ in singles]
    for place, (_, row, *_) in zip(places, owned, strict=True):
        per_row[row].append(place)
    longest = max(len(row) for row in per_row)
    table = torch.tensor([row + [number] * (longest - len(row)) for row in per_row])
    return PageBatch(
        rows=torch.tensor([span.row for span in singles]),
        owner=owner,
        bias=bias.view(number, 1, 1, size),
        table=table,
        runs=tuple(runs),
        gather=gather,
        first=first,
    )


def _runs(ids: Sequence[int]) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Join sorted page ids to runs (first page, first place, pages), small gaps included; and the place of each id."""
    runs: list[tuple[int, int, int]] = []
    places: list[int] = []
    for page in ids:
        if runs and page - (runs[-1][0] + runs[-1][2]) <= _GAP:
            first, place, _ = runs[-1]
            runs[-1] = (first, place, page - first + 1)
        else:
            place = runs[-1][1] + runs[-1][2] if runs else 0
            runs.append((page, place, 1))
        places.append(runs[-1][1] + page - runs[-1][0])
    return runs, places
