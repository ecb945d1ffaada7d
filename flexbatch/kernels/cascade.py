"""Attention over the beginning that several sequences share: read once for all their queries, then merged. CPU.

Each query's softmax is split in two, what is shared and the rest, and put together from the two logarithms of sums
(as in FlashAttention's split-K; the idea for shared prefixes is Hydragen, Juravsky et al., 2024). Knows no sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SharedContext:
    """``rows`` int64 [R] of queries that attend to all of ``pages`` int64 [C], and to more behind them."""

    rows: Tensor
    pages: Tensor

    def to(self, device: torch.device) -> SharedContext:
        """The same on ``device``."""
        return replace(self, rows=self.rows.to(device), pages=self.pages.to(device))


def common_pages(tables: Sequence[Sequence[int]], shared: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group tables that begin with the same pages: how many those are, and which tables.

    Only the first ``shared[i]`` pages of table i can be others', too. Tables that are alone are left out.
    """
    groups: dict[int, list[int]] = {}
    for place, (table, count) in enumerate(zip(tables, shared, strict=True)):
        if count:
            groups.setdefault(table[0], []).append(place)
    found: list[tuple[int, list[int]]] = []
    for places in groups.values():
        if len(places) > 1:
            least = min(shared[place] for place in places)
            columns = zip(*(tables[place][:least] for place in places), strict=True)
            common = 0
            for column in columns:
                if len(set(column)) > 1:
                    break
                common += 1
            found.append((common, places))
    return found


def attend_shared(contexts: Sequence[SharedContext], layer: Tensor, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each context's queries over its pages, one context after the other.

    q [T, heads, D]; layer [pages, kv_heads, 2, P, D] -> [sum of R, heads, D] and the logarithms of the sums
    [sum of R, heads]. Scratch memory: the keys and values of one context.
    """
    _, heads, dim = q.shape
    kv_heads = layer.shape[1]
    outputs, logs = [], []
    for context in contexts:
        held = layer.index_select(0, context.pages).permute(2, 1, 0, 3, 4).flatten(2, 3)  # [2, KV, C * P, D]
        # The queries of a group of heads stand behind one another: all of them read the same keys.
        queries = q.index_select(0, context.rows).view(-1, kv_heads, heads // kv_heads, dim).transpose(0, 1)
        output, log = flash(queries.flatten(1, 2).unsqueeze(0), held[:1], held[1:], scale)
        rows = len(context.rows)
        outputs.append(output.view(kv_heads, rows, -1, dim).transpose(0, 1).reshape(rows, heads, dim))
        logs.append(log.view(kv_heads, rows, -1).transpose(0, 1).reshape(rows, heads))
    return torch.cat(outputs), torch.cat(logs)


def attend_rest(
    pages: Sequence[int], start: int, layer: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of one chunk [n, heads, D] over ``pages`` alone, and the logarithms of the sums [n, heads].

    ``start`` is the place of its first token in them; its own k and v [n, kv_heads, D] are stored there already.
    """
    stop = start + len(q)
    bias: Tensor | None = None
    if start == 0:
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
    else:
        needed = torch.tensor(pages[: -(-stop // layer.shape[3])], device=q.device)
        keys, values = layer.index_select(0, needed).permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :stop]
        hidden = torch.arange(stop) > torch.arange(start, stop).unsqueeze(1)
        bias = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    output, log = flash(
        q.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), scale, causal=bias is None, bias=bias
    )
    return output[0].transpose(0, 1), log[0].transpose(0, 1)


def merged(first: Tensor, first_log: Tensor, second: Tensor, second_log: Tensor) -> Tensor:
    """Join two attentions [R, heads, D] over different keys, with the logarithms of their sums [R, heads]."""
    share = torch.sigmoid(second_log - first_log).unsqueeze(-1)
    return first + (second - first) * share.to(first.dtype)


def flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's fused kernel with the logarithm of the sums: q [1, heads, n, D], k and v [1, kv_heads, L, D].

    The kernel reads D as it lies, without a look at its stride: what products gave transposed is copied.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    output, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return output, log
