"""In which basis keys and values are packed, layer by layer; ``kv4_finder`` finds it.

A key is stored without the part that all keys have in common (which turns with the position, as rotary embedding does),
the first position's besides without what is special to it, and multiplied by a matrix of its head; queries are
multiplied by the inverse, so that scores stay what they were. Values have a mean, a first position and a matrix of
their own, which is undone in what was attended. Knows neither pages nor bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.policy.footprint import kv_group


@functools.cache
def rotation(width: int) -> Tensor:
    """An orthogonal matrix [width, width] that spreads large channels over all: signed Hadamard blocks that fit.

    The source is QuaRot (Ashkboos et al., 2024).
    """
    block = width & -width
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.where(torch.rand(block, 1, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    whole: Tensor = torch.block_diag(*[signs * matrix / block**0.5] * (width // block))
    return whole


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """One layer's basis, fp32; ``keys`` and ``queries`` [kv_heads, D, D] are inverse to each other's transpose.

    A key k at position p is stored as (k - mean at p) keys, a value v as (v - value_means) values; ``results`` is the
    inverse of ``values`` [kv_heads, D, D]. Of position 0 ``first_keys`` and ``first_values`` [kv_heads, D] are taken
    from that. ``means`` [kv_heads, D] are those of keys at position 0; rotary embedding turns them to the others.

    Even channels of a group are rounded first; their errors times ``key_feedback`` (``value_feedback``) [kv_heads,
    groups, n / 2, n / 2] are added to the odd ones before these are rounded, so that one makes up for the other.
    """

    keys: Tensor
    queries: Tensor
    key_feedback: Tensor
    means: Tensor
    first_keys: Tensor
    values: Tensor
    results: Tensor
    value_feedback: Tensor
    value_means: Tensor
    first_values: Tensor

    @classmethod
    def plain(cls, kv_heads: int, head_dim: int) -> Basis:
        """Nothing taken away, nothing stretched, nothing made up for."""
        turn = rotation(head_dim).expand(kv_heads, -1, -1).contiguous()
        back = turn.transpose(1, 2).contiguous()
        group = kv_group(head_dim)
        still = torch.zeros(kv_heads, head_dim // group, group // 2, group // 2)
        nothing = torch.zeros(kv_heads, head_dim)
        return cls(turn, turn, still, nothing, nothing, turn, back, still, nothing, nothing)

    def to(self, device: torch.device) -> Basis:
        """The same on ``device``."""
        return Basis(*(getattr(self, name).to(device) for name in self.__slots__))

    def stored_keys(self, k: Tensor, positions: Tensor, turns: Tensor | None) -> Tensor:
        """Keys [T, kv_heads, D] at ``positions`` int64 [T] -> fp32 [T, kv_heads, D] as they are packed."""
        rest = k.float() - turned(self.means, None if turns is None else turns[positions])
        return _without(by_head(rest, self.keys), positions, self.first_keys)

    def stored_values(self, v: Tensor, positions: Tensor) -> Tensor:
        """Values [T, kv_heads, D] -> fp32 [T, kv_heads, D] as they are packed."""
        return _without(by_head(v.float() - self.value_means, self.values), positions, self.first_values)

    def meeting(self, q: Tensor) -> Tensor:
        """Queries [T, heads, D] as they meet stored keys, of the same dtype."""
        return by_head(q, self.queries)

    def attended(self, stored: Tensor) -> Tensor:
        """What was attended of stored values [T, heads, D] -> [T, heads, D], of the same dtype."""
        found: Tensor = by_head(stored, self.results).unflatten(1, (self.value_means.shape[0], -1))
        whole: Tensor = found.add_(self.value_means.to(stored.dtype).unsqueeze(1)).flatten(1, 2)
        return whole

    def meeting_means(self, q: Tensor) -> Tensor:
        """Queries [T, heads, D] -> [T, heads, D], whose product with ``turns`` at a position is that with the mean."""
        tokens, heads, dim = q.shape
        first, second = q.view(tokens, self.means.shape[0], -1, dim).chunk(2, dim=-1)
        lower, upper = self.means.to(q.dtype).unsqueeze(1).chunk(2, dim=-1)
        found = torch.cat([first * lower + second * upper, second * lower - first * upper], -1)
        return found.view(tokens, heads, dim)

    def mean_keys(self, turns: Tensor, heads: slice) -> Tensor:
        """What is missing of stored keys at the positions of ``turns`` [L, D]: [kv_heads of ``heads``, L, D]."""
        return torch.matmul(turned(self.means[heads], turns).transpose(0, 1), self.keys[heads])


def turned(means: Tensor, turns: Tensor | None) -> Tensor:
    """Means [kv_heads, D] at positions whose cosines and sines are ``turns`` [T, D] -> [T, kv_heads, D].

    Without rotary embedding (None) they are the same everywhere, [1, kv_heads, D], and softmax does not see them.
    """
    if turns is None:
        return means.unsqueeze(0)
    cos, sin = turns.unsqueeze(1).chunk(2, dim=-1)
    first, second = means.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """Numbers x [T, heads, D] times the matrix of each head's KV head, ``matrices`` [kv_heads, D, D]; x's dtype."""
    tokens, heads, dim = x.shape
    kv_heads = matrices.shape[0]
    group = heads // kv_heads
    grouped = x.view(tokens, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, tokens * group, dim)
    found = torch.matmul(grouped, matrices.to(x.dtype))
    return found.view(kv_heads, tokens, group, dim).transpose(0, 1).reshape(tokens, heads, dim)


def _without(x: Tensor, positions: Tensor, first: Tensor) -> Tensor:
    return x - first * (positions == 0).view(-1, 1, 1)
