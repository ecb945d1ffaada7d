"""In which basis keys and values are packed: per layer, found from a few tokens that the model has seen.

A group's step is as large as its largest number, and an error in a key counts by the queries that meet it. So the part
that all keys have in common is taken away (before rotary: it turns with the position), the first position's, on which
attention rests, besides; what is left is stretched so that neither keys nor queries have large and small directions,
and spread over all channels. Scores stay what they were. Knows neither pages nor bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_SKIPPED = 4  # first tokens of a sequence, unlike all others
_RIDGE = 0.03  # of a covariance's mean diagonal: a few hundred tokens do not know every direction


@functools.cache
def rotation(head_dim: int) -> Tensor:
    """An orthogonal matrix [D, D] that spreads large channels over all: signed Hadamard blocks, as large as fit.

    The source is QuaRot (Ashkboos et al., 2024).
    """
    block = head_dim & -head_dim
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.where(torch.rand(block, 1, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    whole: Tensor = torch.block_diag(*[signs * matrix / block**0.5] * (head_dim // block))
    return whole


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """One layer's basis, fp32; ``keys`` and ``queries`` [kv_heads, D, D] are inverse to each other's transpose.

    A key k at position p is stored as (k - mean at p) keys, a value v as v ``values`` (orthogonal [D, D]); of position
    0 ``first_keys`` and ``first_values`` [kv_heads, D] are taken from that. ``means`` [kv_heads, D] are those at
    position 0; rotary embedding turns them to the others.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    means: Tensor
    first_keys: Tensor
    first_values: Tensor

    @classmethod
    def plain(cls, kv_heads: int, head_dim: int) -> Basis:
        """Nothing taken away, nothing stretched."""
        turn = rotation(head_dim)
        every = turn.expand(kv_heads, -1, -1)
        nothing = torch.zeros(kv_heads, head_dim)
        return cls(every, every, turn, nothing, nothing, nothing)

    def to(self, device: torch.device) -> Basis:
        """The same on ``device``."""
        return Basis(*(getattr(self, name).to(device) for name in self.__slots__))

    def stored_keys(self, k: Tensor, positions: Tensor, turns: Tensor | None) -> Tensor:
        """Keys [T, kv_heads, D] at ``positions`` int64 [T] -> fp32 [T, kv_heads, D] as they are packed."""
        rest = k.float() - turned(self.means, None if turns is None else turns[positions])
        found = torch.matmul(rest.transpose(0, 1), self.keys).transpose(0, 1)
        return _without(found, positions, self.first_keys)

    def stored_values(self, v: Tensor, positions: Tensor) -> Tensor:
        """Values [T, kv_heads, D] -> fp32 [T, kv_heads, D] as they are packed."""
        return _without(v.float() @ self.values, positions, self.first_values)

    def meeting(self, q: Tensor) -> Tensor:
        """Queries [T, heads, D] as they meet stored keys, of the same dtype."""
        tokens, heads, dim = q.shape
        kv_heads = self.queries.shape[0]
        grouped = q.view(tokens, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
        found = torch.matmul(grouped, self.queries.to(q.dtype))
        return found.view(kv_heads, tokens, -1, dim).transpose(0, 1).reshape(tokens, heads, dim)

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


def _without(x: Tensor, positions: Tensor, first: Tensor) -> Tensor:
    return x - first * (positions == 0).view(-1, 1, 1)


class BasisFinder:
    """Adds up what one layer's queries, keys and values look like, sequence by sequence."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> int:
        """One whole sequence from its first token on: q [T, heads, D], k and v [T, kv_heads, D]; how many there are.

        They are kept, in fp32 on the CPU.
        """
        self._seen.append((q.float().cpu(), k.float().cpu(), v.float().cpu()))
        return len(self._seen)

    def find(self, turns: Tensor | None) -> Basis:
        """The basis for what was added; ``turns`` [L, D] as in ``turned``, on the CPU."""
        kv_heads, dim = self._seen[0][1].shape[1:]
        plain = Basis.plain(kv_heads, dim)
        keys = [k for _, k, _ in self._seen]
        still = torch.cat([_turned_back(k, turns)[_SKIPPED:] for k in keys])
        means = still.mean(0)  # [KV, D]
        rests = [k - turned(means, None if turns is None else turns[: len(k)]) for k in keys]
        rest = torch.cat([r[_SKIPPED:] for r in rests]).transpose(0, 1)  # [KV, T, D]
        q = torch.cat([q[_SKIPPED:] for q, _, _ in self._seen]).unflatten(1, (kv_heads, -1))
        covariances = [_covariance(x) for x in (q.transpose(0, 1).flatten(1, 2), rest)]
        if not all(bool(x.isfinite().all()) for x in (*covariances, means)):
            return plain
        stretch, back = _balanced(covariances[0], covariances[1])
        turn = rotation(dim)
        forth = stretch.float() @ turn
        first = torch.stack([r[0] for r in rests]).mean(0)  # [KV, D]
        values = torch.stack([v[0] for _, _, v in self._seen]).mean(0)
        return Basis(
            keys=forth,
            queries=back.float() @ turn,
            values=turn,
            means=means,
            first_keys=torch.matmul(first.unsqueeze(1), forth).squeeze(1),
            first_values=values @ turn,
        )


def _turned_back(k: Tensor, turns: Tensor | None) -> Tensor:
    """Keys [T, KV, D] of the first T positions without their rotary embedding."""
    if turns is None:
        return k
    cos, sin = turns[: len(k)].unsqueeze(1).chunk(2, dim=-1)
    length = cos.square() + sin.square()  # not 1 where the embedding also scales
    first, second = k.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1) / torch.cat([length, length], -1)


def _covariance(x: Tensor) -> Tensor:
    """[KV, T, D] -> float64 [KV, D, D] with a ridge; of nothing but zeros it is the identity."""
    wide = x.double()
    found = wide.transpose(1, 2) @ wide / max(1, x.shape[1])
    size = found.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)
    eye = torch.eye(x.shape[2], dtype=torch.float64)
    return found / size[:, None, None] + _RIDGE * eye


def _power(x: Tensor, exponent: float) -> Tensor:
    """A power of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh(x)
    found: Tensor = (vectors * values.clamp_min(1e-12).pow(exponent).unsqueeze(-2)) @ vectors.transpose(-1, -2)
    return found


def _balanced(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric A and its inverse for which A keys A and its counterpart of queries, A^-1 queries A^-1, are equal.

    Of all A this makes the product of the two mean squares least, and so the error of scores.
    """
    root = _power(queries, 0.5)
    square = root @ _power(root @ keys @ root, -0.5) @ root
    return _power(square, 0.5), _power(square, -0.5)
