"""Weights widened tile by tile."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.compression.precision import tile_rows, widened_tiles


@given(outputs=st.integers(1, 5000), most=st.integers(-1, 5000))
def test_tiles_keep_their_limit_and_give_every_thread_as_many_blocks(outputs: int, most: int) -> None:
    rows = tile_rows(outputs, most)
    assert 1 <= rows <= max(1, min(outputs, most))
    threads = torch.get_num_threads()
    if rows < outputs and most >= 64 * threads:
        assert rows % (64 * threads) == 0
    elif rows < outputs and most >= 64:
        assert rows % 64 == 0
    if most > 0:  # no more tiles than twice as many as there must be, and those that whole blocks cost
        assert -(-outputs // rows) <= 2 * -(-outputs // most)


@given(outputs=st.integers(1, 400), inputs=st.integers(1, 70), kib=st.integers(0, 64))
def test_widened_tiles_are_the_weight(outputs: int, inputs: int, kib: int) -> None:
    weight = torch.randn(outputs, inputs).bfloat16()
    tiles = [(rows, tile.clone()) for rows, tile in widened_tiles(weight, torch.float32, kib << 10)]
    assert torch.equal(torch.cat([tile for _, tile in tiles]), weight.float())
    assert [rows.start for rows, _ in tiles] == [0, *(rows.stop for rows, _ in tiles[:-1])]
    assert all(tile.nbytes <= max(kib << 10, 4 * inputs) for _, tile in tiles)
