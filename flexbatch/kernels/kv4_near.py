"""Near tokens in more than 4 bits: attention weighs them most, and so do their errors.

A query reads its own token as it is, the ``KV_NEAR`` tokens before it in 6 bits, and all others in 4. The two bits more
are kept for the newest tokens of each page alone, behind its rows; those of a prompt's inner tokens exist only while
its chunk is computed, so that what a query reads does not depend on how its prompt was cut.

Attention over 4 bits comes first, by whatever kernel; ``sharpen`` then takes the near tokens' shares out of it and
puts better ones in, from the logarithms of the sums. Knows neither kernels nor sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from flexbatch.kernels.kv4_basis import Basis
from flexbatch.policy.footprint import KV_NEAR, KV_TILE_BYTES

_LEVELS = 4  # of the two bits more
_LARGEST = 60.0  # exponent in fp32: such a token is all that counts


class _Queries(Protocol):
    """Part of a sequence's queries, as ``attention.Span``."""

    @property
    def row(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def pages(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class NearIndex:
    """Which tokens the T queries of a micro-batch are near to.

    ``pages``, ``offsets`` and ``positions`` int64 [B]: the tokens before each sequence's first query. ``places`` int64
    [T, n]: the tokens before each query, the nearest first, by their row, or T and more for those B. ``seen`` bool
    [T, n]: whether there is one, in the window. ``newest`` int64 [K]: the rows of tokens that their page keeps more of
    than 4 bits, once all T are stored.
    """

    pages: Tensor
    offsets: Tensor
    positions: Tensor
    places: Tensor
    seen: Tensor
    newest: Tensor

    def to(self, device: torch.device) -> NearIndex:
        """The same on ``device``."""
        return replace(
            self,
            pages=self.pages.to(device, non_blocking=True),
            offsets=self.offsets.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            places=self.places.to(device, non_blocking=True),
            seen=self.seen.to(device, non_blocking=True),
            newest=self.newest.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """Keys and values of T tokens, fp32 [T, kv_heads, 2, D], as they are stored: exactly, in 4 bits and in 6."""

    exact: Tensor
    coarse: Tensor
    fine: Tensor


def near_index(spans: Sequence[_Queries], page_tokens: int, window: int | None) -> NearIndex:
    """Index what the queries of ``spans`` are near to; ``window``: how many recent positions a token sees."""
    reach = min(KV_NEAR, page_tokens)
    back = torch.arange(1, reach + 1)
    total = sum(span.count for span in spans)
    before, pages, places, positions, kept = [], [], [], [], []
    for number, span in enumerate(spans):
        # Where there is none, the sequence's own first query stands in, which is there.
        each = [span.start - step if step <= span.start else span.start for step in range(1, reach + 1)]
        before += each
        pages += [span.pages[position // page_tokens] for position in each]
        inner = torch.arange(span.count).unsqueeze(1) - back  # [count, n]
        outside = total + number * reach - inner - 1
        places.append(torch.where(inner >= 0, inner + span.row, outside))
        own, stop = torch.arange(span.start, span.start + span.count), span.start + span.count
        positions.append(own)
        ends = ((own // page_tokens + 1) * page_tokens).clamp_(max=stop)  # of what is stored in each token's page
        kept.append((own + reach >= ends).nonzero().squeeze(1) + span.row)
    order = torch.argsort(torch.cat([torch.arange(span.row, span.row + span.count) for span in spans]))
    at = torch.cat(positions)[order].unsqueeze(1)
    where = torch.tensor(before)
    seen = at >= back
    if window is not None:
        seen &= back < window
    return NearIndex(
        torch.tensor(pages), where % page_tokens, where, torch.cat(places)[order], seen, torch.cat(kept).sort().values
    )


def finer(exact: Tensor, coarse: Tensor, scales: Tensor) -> Tensor:
    """Two bits more of every number: codes uint8 [..., D] of what 4 bits leave, in quarters of a step.

    exact, coarse and the ``scales`` of their groups [..., D].
    """
    place = (exact - coarse).div_(scales).mul_(_LEVELS).add_((_LEVELS - 1) / 2)
    return place.round_().clamp_(0, _LEVELS - 1).nan_to_num_(0).to(torch.uint8)


def fine_of(codes: Tensor, coarse: Tensor, scales: Tensor) -> Tensor:
    """The numbers in 6 bits, of ``finer``'s codes."""
    return torch.addcmul(coarse, codes.float().sub_((_LEVELS - 1) / 2), scales, value=1 / _LEVELS)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [..., D] -> uint8 [..., D / 4, rounded up], the first in the lowest bits."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4))
    first, second, third, fourth = padded.unbind(-1)
    whole: Tensor = first | second << 2 | third << 4 | fourth << 6
    return whole


def unpack_codes(packed: Tensor, dim: int) -> Tensor:
    """What ``pack_codes`` packed, [..., D]."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 3).flatten(-2)[..., :dim]


def sharpen(
    out: Tensor,
    logs: Tensor,
    q: Tensor,
    index: NearIndex,
    own: Numbers,
    before: Numbers,
    positions: Tensor,
    scale: float,
    basis: Basis,
    turns: Tensor | None,
) -> Tensor:
    """Attention over 4 bits, ``out`` fp32 [T, heads, D] with the logarithms of its sums ``logs`` [T, heads] -> better.

    ``q`` [T, heads, D] meets stored keys; ``own`` are the numbers of the T tokens at ``positions``, ``before`` those of
    the B of ``index``. ``turns`` as for ``kv4.store_packed``. Scratch memory: a few times those numbers, and a tile.
    """
    tokens, heads, dim = out.shape
    kv_heads = basis.means.shape[0]
    coarse, fine = (torch.cat([getattr(own, name), getattr(before, name)]) for name in ("coarse", "fine"))
    table = torch.cat([coarse, fine, own.exact])
    where = torch.cat([positions, index.positions])
    missing = _missing(where, basis, turns)
    table += torch.cat([missing, missing, missing[:tokens]])
    count = len(coarse)
    rows = torch.arange(tokens, device=out.device).unsqueeze(1)
    wanted = torch.cat([rows, index.places, rows + 2 * count, index.places + count], 1)  # [T, 2 (n + 1)]
    seen = torch.cat([torch.ones_like(index.seen[:, :1]), index.seen], 1).view(tokens, 1, 1, -1)
    grouped = q.float().view(tokens, kv_heads, heads // kv_heads, dim)
    sums = logs.view(tokens, kv_heads, heads // kv_heads, 1)
    better = torch.empty_like(out)
    width = wanted.shape[1]
    step = max(1, KV_TILE_BYTES // (8 * width * kv_heads * dim))
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        read = table.index_select(0, wanted[part].flatten()).view(-1, width, kv_heads, 2, dim)
        scores = torch.matmul(grouped[part], read[:, :, :, 0].permute(0, 2, 3, 1)).mul_(scale).sub_(sums[part])
        shares = scores.clamp_(max=_LARGEST).exp_().view(*scores.shape[:3], 2, -1)
        shares = torch.where(seen[part].unsqueeze(3), shares, shares.new_zeros(()))
        shares[..., 0, :].neg_()
        change = torch.matmul(shares.flatten(3), read[:, :, :, 1].transpose(1, 2)).view(-1, heads, dim)
        whole = shares.sum((3, 4)).add_(1).view(-1, heads, 1)
        better[part] = (out[part] + change).div_(whole)
    return better


def _missing(positions: Tensor, basis: Basis, turns: Tensor | None) -> Tensor:
    """What stored numbers lack at ``positions`` [n] to meet queries and be attended: fp32 [n, kv_heads, 2, D]."""
    first = (positions == 0).view(-1, 1, 1)
    keys, values = first * basis.first_keys, first * basis.first_values
    if turns is not None:
        keys = keys + basis.mean_keys(turns[positions], slice(None)).transpose(0, 1)
    return torch.stack([keys, values], 2)
