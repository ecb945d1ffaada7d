"""4-bit pages: their bytes against a decoder by hand, attention over them against dense products in float64."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from flexbatch.kernels import kv4
from flexbatch.kernels.attention import Span, attend, prepare
from flexbatch.kernels.kv4 import Tokens, attend_packed, pack_rows, rows_of, store_packed, unpack_rows
from flexbatch.kernels.kv4_basis import Basis, rotation, turned
from flexbatch.kernels.kv4_finder import BasisFinder
from flexbatch.kernels.kv4_near import near_index
from flexbatch.kernels.rotary import RotaryTable, apply_rotary
from flexbatch.policy.footprint import KV_NEAR, kv_area_bytes, kv_group, kv_head_bytes
from flexbatch.shapes import Rope
from tests.kernels.paged_cases import Case, Shape, build, random_shape
from tests.packed_oracle import six_bits

CPU = torch.device("cpu")
DIMS = (8, 20, 48, 64, 80, 128)


def decoded(row: Tensor, dim: int) -> list[float]:
    """One packed row as its documentation says."""
    raw, group = bytes(row.tolist()), kv_group(dim)
    numbers: list[float] = []
    for start in range(0, len(raw), group // 2 + 4):
        scale, minimum = struct.unpack_from("<ee", raw, start + group // 2)
        for byte in raw[start : start + group // 2]:
            numbers += [scale * (byte & 15) + minimum, scale * (byte >> 4) + minimum]
    return numbers


@pytest.mark.parametrize("dim", DIMS)
def test_rows_are_what_the_format_says(dim: int) -> None:
    torch.manual_seed(dim)
    x = torch.randn(3, 2, dim)
    rows = pack_rows(x, Basis.plain(2, dim).key_feedback)
    assert rows.shape == (3, 2, kv_head_bytes(dim))
    numbers = unpack_rows(rows, dim)
    expected = torch.tensor([decoded(row, dim) for row in rows.view(6, -1)], dtype=torch.float64).float()
    assert torch.equal(numbers, expected.view(3, 2, dim))
    groups = x.view(-1, kv_group(dim))
    steps = (groups.amax(1) - groups.amin(1)) / 15
    error = (numbers - x).view_as(groups).square().mean(1)
    assert bool((error.mean() < steps.square().mean() / 12 * 1.1).all())


def test_capacity() -> None:
    for dim in (64, 80, 96, 128, 256):
        assert 64 * 2 * dim / kv_area_bytes(64, dim) >= 3.4


def test_numbers_beyond_fp16_and_none() -> None:
    x = torch.randn(3, 1, 64)
    x[0, 0, 5], x[1, 0, 3] = 1e6, torch.nan
    found = unpack_rows(pack_rows(x, Basis.plain(1, 64).key_feedback), 64)
    assert float(found[0, 0, 5]) == pytest.approx(65504, rel=0.01)
    assert not found[1].isfinite().any()
    assert found[2].isfinite().all()


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_is_orthogonal_and_flattens_outliers(dim: int) -> None:
    matrix = rotation(dim).double()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(dim, dtype=torch.float64), atol=1e-6, rtol=0)
    if dim % 16 == 0:
        k = torch.randn(7, dim)
        k[:, 3] = 50.0
        assert float((k @ rotation(dim)).abs().amax()) < 30


def table(rng: random.Random, dim: int) -> Tensor | None:
    """Cosines and sines for the longest cases, or none."""
    if dim % 2 or rng.random() < 0.3:
        return None
    factor = rng.choice([1.0, 0.8])
    return RotaryTable(Rope(theta=1000.0, dim=dim)).turns(512) * factor


def drawn(kv_heads: int, dim: int, turns: Tensor | None) -> Basis:
    """A basis with everything in it."""
    finder = BasisFinder()
    for _ in range(2):
        q, k, v = (torch.randn(90, heads, dim) * torch.rand(dim) for heads in (2 * kv_heads, kv_heads, kv_heads))
        k[0] += 4 * torch.randn(kv_heads, dim)
        k += turned(torch.randn(kv_heads, dim), None if turns is None else turns[:90])
        finder.add(q, k, v)
    return finder.find(turns)


def pool_of(case: Case) -> Tensor:
    """An empty packed pool for a case: any bytes, NaN among them."""
    pages, heads, _, size, dim = case.pool.shape
    return torch.randint(0, 256, (pages, heads, 2, kv_area_bytes(size, dim)), dtype=torch.uint8)


def parts_of(case: Case, *cuts: Sequence[int]) -> Iterator[tuple[int, Tokens]]:
    """Each sequence's tokens, cut into parts at ``cuts``: the sequence's number and a part of it."""
    size = case.shape.page_tokens
    for number, ((keys, values), span) in enumerate(zip(case.histories, case.spans, strict=True)):
        where = torch.tensor(span.pages, device=keys.device).repeat_interleave(size)[: len(keys)]
        positions = torch.arange(len(keys), device=keys.device)
        borders = [*(each[number] for each in cuts)]
        for start, stop in itertools.pairwise(borders):
            part = slice(start, stop)
            at = positions[part]
            yield number, Tokens(keys[part], values[part], where[part], at % size, at)


def fill(pool: Tensor, case: Case, basis: Basis, turns: Tensor | None) -> None:
    """Store what came before each sequence's queries, in two parts."""
    starts = [span.start for span in case.spans]
    middles = [random.Random(start).randint(0, start) for start in starts]
    for _, tokens in parts_of(case, [0] * len(starts), middles, starts):
        count = len(tokens.positions)
        if count:
            span = Span(0, count, int(tokens.positions[0]), list(range(int(tokens.positions[-1]) + 1)))
            newest = near_index([span], case.shape.page_tokens, None).newest.to(pool.device)
            store_packed(pool, on(tokens, pool.device), newest, basis, turns)


def on(tokens: Tokens, device: torch.device) -> Tokens:
    """The same on ``device``."""
    return Tokens(*(getattr(tokens, name).to(device) for name in Tokens.__slots__))


def own_of(case: Case) -> Tokens:
    """The tokens of the queries, in the order of their rows."""
    stops = [span.start + span.count for span in case.spans]
    parts = [tokens for _, tokens in parts_of(case, [span.start for span in case.spans], stops)]
    return Tokens(*(torch.cat([getattr(part, name) for part in parts]) for name in Tokens.__slots__))


def expected_of(case: Case, pool: Tensor, basis: Basis, turns: Tensor | None) -> Tensor:
    """Attention of all queries in float64: far tokens as ``pool`` has them, near ones in 6 bits, their own exactly."""
    shape, rows = case.shape, []
    stored = rows_of(pool, shape.dim)
    for (keys, values), span in zip(case.histories, case.spans, strict=True):
        positions = torch.arange(len(keys))
        first = (positions == 0).view(-1, 1, 1)
        where = torch.tensor(span.pages).repeat_interleave(shape.page_tokens)[: len(keys)]
        there = stored[where, :, :, positions % shape.page_tokens]
        read = []
        for place, exact, special, forth in (
            (0, basis.stored_keys(keys, positions, turns), basis.first_keys, basis.keys),
            (1, basis.stored_values(values, positions), basis.first_values, basis.values),
        ):
            back = torch.linalg.inv(forth.double())
            ways = (*six_bits(exact, there[:, :, place].contiguous()), exact)
            read.append([torch.einsum("lkd,kde->lke", (way + first * special).double(), back) for way in ways])
        means = turned(basis.means, None if turns is None else turns[positions]).double()
        for query in range(span.count):
            at, own = span.start + query, case.q[span.row + query].double()
            far = torch.full((at + 1,), 0)
            far[max(0, at - min(KV_NEAR, shape.page_tokens)) :] = 1
            far[at] = 2
            k = torch.stack([way[: at + 1] for way in read[0]])[far, torch.arange(at + 1)] + means[: at + 1]
            v = torch.stack([way[: at + 1] for way in read[1]])[far, torch.arange(at + 1)] + basis.value_means
            low = 0 if shape.window is None else max(0, at + 1 - shape.window)
            k, v = (x[low:].repeat_interleave(shape.group, 1) for x in (k, v))
            weights = (torch.einsum("hd,lhd->hl", own, k) * case.scale).softmax(-1)
            rows.append((span.row + query, torch.einsum("hl,lhd->hd", weights, v)))
    return torch.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])])


@pytest.mark.parametrize("seed", range(16))
def test_attention_equals_dense_products_over_what_is_stored(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    monkeypatch.setattr(kv4, "_TILE_BYTES", rng.choice([1, 20_000, 4 << 20]))
    shape = random_shape(rng, dims=(8, 20, 48, 64), sizes=(4, 16, 48), longest=90)
    case = build(rng, shape, torch.float32, CPU)
    turns = table(rng, shape.dim)
    basis = drawn(shape.kv_heads, shape.dim, turns)
    pool = pool_of(case)
    fill(pool, case, basis, turns)
    batch = prepare(case.spans, shape.page_tokens, shape.window, torch.float32, packed=True)
    found = attend_packed(batch, pool, case.q, own_of(case), case.scale, basis, turns)
    expected = expected_of(case, pool, basis, turns)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("size", "window"), [(16, None), (4, None), (48, 3), (16, 30)])
def test_how_a_prompt_is_cut_changes_nothing(size: int, window: int | None) -> None:
    case = build(random.Random(3), Shape(2, 3, 64, size, window, ((0, 70),)), torch.float32, CPU)
    (keys, values), (span,) = case.histories[0], case.spans
    torch.manual_seed(0)
    basis, positions = drawn(2, 64, None), torch.arange(70)
    where = torch.tensor(span.pages).repeat_interleave(size)[:70]
    found = []
    for cuts in ([0, 70], [0, 1, 2, 3, 10, 16, 17, 33, 60, 70], list(range(71))):
        pool, parts = pool_of(case), []
        for start, stop in itertools.pairwise(cuts):
            part = slice(start, stop)
            tokens = Tokens(keys[part], values[part], where[part], positions[part] % size, positions[part])
            batch = prepare([Span(0, stop - start, start, span.pages)], size, window, torch.float32, packed=True)
            parts.append(attend_packed(batch, pool, case.q[part], tokens, case.scale, basis, None))
        found.append(torch.cat(parts))
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-5


def test_attention_is_near_that_over_full_pages() -> None:
    shape = Shape(2, 3, 64, 16, None, ((200, 1), (0, 40), (90, 1), (30, 20)))
    case = build(random.Random(3), shape, torch.float32, CPU)
    batch = prepare(case.spans, 16, None, torch.float32, packed=True)
    basis, pool = Basis.plain(2, 64), pool_of(case)
    fill(pool, case, basis, None)
    found = attend_packed(batch, pool, case.q, own_of(case), case.scale, basis, None)
    expected = attend(batch, case.pool.nan_to_num(), case.q, case.k, case.v, case.scale)
    assert float((found - expected).norm() / expected.norm()) < 0.12


@pytest.mark.parametrize("rotary", [False, True])
def test_a_basis_takes_away_what_keys_have_in_common(rotary: bool) -> None:
    torch.manual_seed(0)
    turns = RotaryTable(Rope(theta=1000.0, dim=64)).turns(256) if rotary else None
    common, size = 8 * torch.randn(2, 64), torch.logspace(-1, 1, 64)[torch.randperm(64)]

    def draw(length: int) -> tuple[Tensor, Tensor, Tensor]:
        k = turned(common, None if turns is None else turns[:length]) + torch.randn(length, 2, 64) * size
        k = k.expand(length, -1, -1).contiguous()
        k[0] = 20.0
        return torch.randn(length, 4, 64) / size.sqrt(), k, torch.randn(length, 2, 64)

    finder = BasisFinder()
    for _ in range(3):
        finder.add(*draw(200))
    q, k, _ = draw(256)
    positions = torch.arange(256)
    errors = []
    for basis in (Basis.plain(2, 64), finder.find(turns)):
        keys = unpack_rows(pack_rows(basis.stored_keys(k, positions, turns), basis.key_feedback), 64)
        keys[0] += basis.first_keys
        scores = torch.einsum("tkgd,lkd->tkgl", basis.meeting(q).view(256, 2, 2, 64), keys)
        if turns is not None:
            scores += torch.einsum("tkgd,ld->tkgl", basis.meeting_means(q).view(256, 2, 2, 64), turns[:256])
        else:
            scores += torch.einsum("tkgd,kd->tkg", q.view(256, 2, 2, 64), basis.means).unsqueeze(-1)
        exact = torch.einsum("tkgd,lkd->tkgl", q.view(256, 2, 2, 64), k)
        errors.append(float((scores - exact).norm() / exact.norm()))
    assert errors[1] < 0.4 * errors[0]


def test_a_basis_of_numbers_that_are_none_is_the_plain_one() -> None:
    finder = BasisFinder()
    finder.add(torch.full((9, 2, 8), torch.nan), torch.randn(9, 1, 8), torch.randn(9, 1, 8))
    assert torch.equal(finder.find(None).keys[0], rotation(8))


def test_rotary_turns_means_as_it_turns_keys() -> None:
    means = torch.randn(2, 16)
    rotary = RotaryTable(Rope(theta=100.0, dim=16))
    cos, sin = rotary.lookup(torch.arange(40))
    expected = apply_rotary(means.expand(40, -1, -1), cos, sin)
    torch.testing.assert_close(turned(means, rotary.turns(40)[:40]), expected)
