"""Finds the basis that a layer's keys and values are packed in, from a few tokens that the model has seen.

An error in a key counts by the queries that meet it, one in a value by the output matrix that it passes. In the basis
found here the numbers to be packed have one size in all channels, and the channels of a group come in pairs: what
rounding the first of a pair does wrong, the second makes up for, so that of both errors the geometric mean is left.
(Rounding to the nearest point of a lattice by successive planes: Babai, 1986.) Knows neither pages nor bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexbatch.kernels.kv4_basis import Basis, rotation, turned
from flexbatch.policy.footprint import kv_group

_SKIPPED = 4  # first tokens of a sequence, unlike all others
_RIDGE = 0.1  # of a covariance's mean diagonal: a few hundred tokens do not know every direction


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

    def find(self, turns: Tensor | None, outputs: Tensor | None = None) -> Basis:
        """The basis for what was added; ``turns`` [L, D] as in ``turned``, on the CPU.

        ``outputs`` [n, heads, D]: directions of the layer's output as they come back through its output matrix; the
        errors of values are weighed by them (None: all directions alike).
        """
        kv_heads, dim = self._seen[0][1].shape[1:]
        keys = [k for _, k, _ in self._seen]
        means = torch.cat([_turned_back(k, turns)[_SKIPPED:] for k in keys]).mean(0)  # [KV, D]
        rests = [k - turned(means, None if turns is None else turns[: len(k)]) for k in keys]
        value_means = torch.cat([v[_SKIPPED:] for _, _, v in self._seen]).mean(0)
        values = [v - value_means for _, _, v in self._seen]
        q = torch.cat([q[_SKIPPED:] for q, _, _ in self._seen])
        if outputs is None:
            outputs = torch.eye(dim).unsqueeze(1).expand(-1, kv_heads, -1)
        seen = [torch.cat([x[_SKIPPED:] for x in parts]) for parts in (rests, values)]
        if not all(bool(x.isfinite().all()) for x in (*seen, q, outputs)):
            return Basis.plain(kv_heads, dim)
        keys_to, keys_back, key_feedback = _paired(_covariance(seen[0], kv_heads), _covariance(q, kv_heads))
        values_to, values_back, value_feedback = _paired(_covariance(seen[1], kv_heads), _covariance(outputs, kv_heads))
        first_keys, first_values = (torch.stack([x[0] for x in parts]).mean(0) for parts in (rests, values))
        return Basis(
            keys=keys_to,
            queries=keys_back.transpose(1, 2).contiguous(),
            key_feedback=key_feedback,
            means=means,
            first_keys=torch.matmul(first_keys.unsqueeze(1), keys_to).squeeze(1),
            values=values_to,
            results=values_back,
            value_feedback=value_feedback,
            value_means=value_means,
            first_values=torch.matmul(first_values.unsqueeze(1), values_to).squeeze(1),
        )


def _turned_back(k: Tensor, turns: Tensor | None) -> Tensor:
    """Keys [T, KV, D] of the first T positions without their rotary embedding."""
    if turns is None:
        return k
    cos, sin = turns[: len(k)].unsqueeze(1).chunk(2, dim=-1)
    length = cos.square() + sin.square()  # not 1 where the embedding also scales
    first, second = k.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1) / torch.cat([length, length], -1)


def _covariance(x: Tensor, kv_heads: int) -> Tensor:
    """[T, heads, D] -> float64 [KV, D, D], of mean diagonal 1 and a ridge; of nothing but zeros the ridge."""
    wide = x.double().unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
    found = wide.transpose(1, 2) @ wide / max(1, wide.shape[1])
    size = found.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)
    covariance: Tensor = found / size[:, None, None] + _RIDGE * torch.eye(x.shape[2], dtype=torch.float64)
    return covariance


def _paired(numbers: Tensor, errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices [KV, D, D] to the basis and back, and the feedback [KV, groups, n / 2, n / 2], fp32.

    ``numbers``: the covariance of what is stored; ``errors``: that of what an error meets.
    """
    kv_heads, dim, _ = numbers.shape
    group = kv_group(dim)
    groups, half = dim // group, group // 2
    # Directions in which numbers have the size 1 and errors count by their weights, rising.
    factor = torch.linalg.cholesky(numbers)
    weights, turn = torch.linalg.eigh(factor.transpose(1, 2) @ errors @ factor)
    directions = torch.linalg.inv(factor).transpose(1, 2) @ turn
    weights = weights.clamp_min(1e-12)
    # A pair is a heavy and a light direction, turned so that the second rounded makes both errors count alike.
    light, heavy = weights[:, : dim // 2], weights[:, dim // 2 :].flip(1)
    size = (light * heavy).pow(0.125)
    cos_square = light.sqrt() / (light.sqrt() + heavy.sqrt())
    cos, sin = cos_square.sqrt(), (1 - cos_square).sqrt()
    along = directions[:, :, dim // 2 :].flip(2) * size.unsqueeze(1)
    across = directions[:, :, : dim // 2] * size.unsqueeze(1)
    first = across * cos.unsqueeze(1) - along * sin.unsqueeze(1)  # [KV, D, pairs]
    second = across * sin.unsqueeze(1) + along * cos.unsqueeze(1)
    share = (heavy - light) * cos * sin / (heavy * cos_square + light * (1 - cos_square))
    # Neighbouring pairs to different groups; in each, all first ones are spread over one another, and all second ones.
    spread = rotation(half).double()
    dealt = [x.unflatten(2, (half, groups)).transpose(2, 3) @ spread for x in (first, second)]  # [KV, D, groups, half]
    forth = torch.stack(dealt, -1).reshape(kv_heads, dim, dim)
    feedback = spread.t() @ torch.diag_embed(share.unflatten(1, (half, groups)).transpose(1, 2)) @ spread
    return forth.float(), torch.linalg.inv(forth).float(), feedback.float()
