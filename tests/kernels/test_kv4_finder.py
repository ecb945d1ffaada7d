"""The basis of packed KV against direct linear algebra: feedback, inverses, and how much errors shrink."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexbatch.kernels.kv4 import pack_rows, unpack_rows
from flexbatch.kernels.kv4_basis import Basis
from flexbatch.kernels.kv4_finder import BasisFinder, _covariance, _paired
from flexbatch.policy.footprint import kv_group

DIMS = (8, 20, 48, 64, 80, 128)


def drawn(tokens: int, heads: int, dim: int, spread: float) -> Tensor:
    """Numbers [tokens, heads, dim] whose directions differ in size up to ``spread``."""
    sizes = torch.logspace(0, spread, dim)
    mixed = torch.linalg.qr(torch.randn(heads, dim, dim))[0]
    numbers: Tensor = ((torch.randn(heads, tokens, dim) * sizes) @ mixed).transpose(0, 1).contiguous()
    return numbers


@pytest.mark.parametrize("dim", DIMS)
def test_feedback_is_the_best_answer_to_the_first_errors(dim: int) -> None:
    torch.manual_seed(dim)
    numbers, errors = (_covariance(drawn(400, 2, dim, 1.0), 2) for _ in range(2))
    forth, back, feedback = _paired(numbers, errors)
    eye = torch.eye(dim).expand(2, -1, -1)
    torch.testing.assert_close(forth @ back, eye, atol=1e-4, rtol=0)
    stored = (forth.double().transpose(1, 2) @ numbers @ forth.double()).diagonal(dim1=1, dim2=2)
    assert bool((stored.amax(1) < 3 * stored.amin(1)).all())  # numbers are about as large everywhere
    meets = back.double() @ errors @ back.double().transpose(1, 2)
    group = kv_group(dim)
    for head in range(2):
        for number in range(dim // group):
            channels = torch.arange(number * group, (number + 1) * group)
            even, odd = channels[0::2], channels[1::2]
            between, second = meets[head][even][:, odd], meets[head][odd][:, odd]
            best = -between @ torch.linalg.inv(second)
            torch.testing.assert_close(feedback[head, number].double(), best, atol=2e-3, rtol=2e-3)
            left = meets[head][even][:, even] - between @ torch.linalg.inv(second) @ between.t()
            torch.testing.assert_close(left.trace(), second.trace(), rtol=1e-3, atol=0)


def error_of(basis: Basis, k: Tensor, q: Tensor, v: Tensor, outputs: Tensor) -> tuple[float, float]:
    """Mean square of the errors of scores, and of what ``outputs`` make of errors of values, over the exact ones."""
    positions = torch.arange(1, len(k) + 1)
    keys = unpack_rows(pack_rows(basis.stored_keys(k, positions, None), basis.key_feedback), k.shape[2])
    scores = torch.einsum("tkd,lkd->ktl", basis.meeting(q), keys)
    exact = torch.einsum("tkd,lkd->ktl", q, k - basis.means)
    values = unpack_rows(pack_rows(basis.stored_values(v, positions), basis.value_feedback), v.shape[2])
    wrong = torch.einsum("lkd,nkd->lkn", basis.attended(values) - v, outputs)
    right = torch.einsum("lkd,nkd->lkn", v, outputs)
    return float((scores - exact).square().mean() / exact.square().mean()), float(
        wrong.square().mean() / right.square().mean()
    )


@pytest.mark.parametrize("dim", [48, 64, 128])
def test_errors_are_a_fraction_of_those_of_the_plain_basis(dim: int) -> None:
    torch.manual_seed(dim)
    heads = 2
    q, k, v = (drawn(600, heads, dim, 1.3) + torch.randn(heads, dim) * size for size in (0, 20, 5))
    outputs = drawn(300, heads, dim, 1.0)
    finder = BasisFinder()
    for part in (slice(0, 150), slice(150, 300)):
        finder.add(q[part], k[part], v[part])
    found = error_of(finder.find(None, outputs), k[300:], q[300:], v[300:], outputs)
    without = error_of(finder.find(None), k[300:], q[300:], v[300:], outputs)
    plain = error_of(Basis.plain(heads, dim), k[300:], q[300:], v[300:], outputs)
    print(found, without, plain)
    assert found[0] < 0.3 * plain[0]
    assert found[1] < 0.5 * plain[1]
    assert found[1] < 0.9 * without[1]
    assert without[0] == found[0]


def test_groups_of_tokens_and_heads_do_not_touch() -> None:
    torch.manual_seed(0)
    finder = BasisFinder()
    finder.add(*(drawn(80, heads, 128, 1.0) for heads in (6, 3, 3)))
    basis = finder.find(None)
    x = torch.randn(30, 3, 128)
    rows = pack_rows(x, basis.key_feedback)
    for token, head in ((0, 0), (7, 2), (29, 1)):
        alone = pack_rows(x[token : token + 1, head : head + 1], basis.key_feedback[head : head + 1])
        assert torch.equal(alone[0, 0], rows[token, head])
    halves = pack_rows(x[:, :, :64].contiguous(), basis.key_feedback[:, :1])
    assert torch.equal(halves, rows[..., :36])
