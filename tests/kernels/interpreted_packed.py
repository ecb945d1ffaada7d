"""The Triton kernels for 4-bit weights and pages in Triton's interpreter; run by ``test_packed_triton``.

The interpreter has to be chosen before triton is imported: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime import interpreter  # type: ignore[import-untyped]

from flexbatch.compression.groups import GROUPS, dequantize
from flexbatch.kernels.packed_triton import Tile, packed_product, tile_for
from tests.kernels.packed_cases import distance, random_packed


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    patch: Callable[..., None] = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        # Triton 3.6 makes loop bounds of arrays of one number by int(), which NumPy refuses since 2.4.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("seed", range(8))
def test_fused_products(seed: int, group: int) -> None:
    rng = random.Random(seed * 1000 + group)
    shape = (rng.randint(1, 80), rng.choice([1, 31, 64, 129, 300]))
    weight = random_packed(rng, shape, group)
    rows = rng.choice([1, 3, 16, 40])
    dtype = rng.choice([torch.float16, torch.float32])
    x = torch.randn(rows, shape[1]).half().to(dtype)
    tile = rng.choice([None, Tile(16, 16, 3, 4, 1), Tile(32, 32, 1, 4, 1)])
    found = packed_product(x, weight, tile)
    assert found.dtype == dtype
    assert distance(found, x.double() @ dequantize(weight).double().t()) < (1e-3 if dtype == torch.float16 else 1e-6)


def test_a_view_of_x_and_of_weight_rows() -> None:
    weight = random_packed(random.Random(1), (70, 128), 64).rows(10, 50)
    x = torch.randn(6, 256)
    expected = x[:, 128:].double() @ dequantize(weight).double().t()
    assert distance(packed_product(x[:, 128:], weight), expected) < 1e-6
    transposed = x[:, 128:].t().contiguous().t()
    assert distance(packed_product(transposed, weight), expected) < 1e-6


def test_few_rows_share_out_the_groups() -> None:
    weight = random_packed(random.Random(2), (64, 640), 64)
    assert tile_for(4, weight).splits == 5
    assert tile_for(400, weight).splits == 1
    x = torch.randn(4, 640)
    assert torch.equal(packed_product(x, weight)[:1], packed_product(x[:1], weight))
