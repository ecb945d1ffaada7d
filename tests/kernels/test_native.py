"""What compiled kernels are made of, number by number; and where there can be none."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flexbatch.kernels import native, numba_parts
from flexbatch.kernels.numba_parts import (
    address_of,
    compiled,
    draw,
    exponential,
    load,
    load_float,
    load_long,
    put,
    store,
)

INTO, OUT, COUNT = range(native.FREE, native.FREE + 3)


def test_exponential() -> None:
    def kernel(record: int) -> None:
        while True:
            piece = draw(record, native.PIECE)
            if piece >= load_long(record, COUNT):
                break
            put(load_long(record, OUT), piece, exponential(load_float(load_long(record, INTO), piece)))

    x = torch.cat([-torch.rand(4000) * 87, -torch.rand(1000), torch.tensor([0.0, -1e-30, -86.99])])
    out = torch.empty_like(x)
    native.launch(address_of(compiled(kernel)), [x.data_ptr(), out.data_ptr(), len(x)])
    torch.testing.assert_close(out.double(), x.double().exp(), rtol=3e-7, atol=0)
    x = torch.tensor([-88.0, -1e4, -math.inf])
    native.launch(address_of(compiled(kernel)), [x.data_ptr(), out.data_ptr(), len(x)])
    assert (out[:3] < 2e-38).all()


@pytest.mark.parametrize("dtype", native.TYPES)
def test_types_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    kind = native.TYPES.index(dtype)

    def kernel(record: int) -> None:
        while True:
            piece = draw(record, native.PIECE)
            if piece >= load_long(record, COUNT):
                break
            store(kind, load_long(record, OUT), piece, load(0, load_long(record, INTO), piece))

    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.00390625, 1.01171875, 3.4e38, 1e-40]
    x = torch.cat([torch.randn(1000), torch.tensor(special)])
    out = torch.empty(len(x), dtype=dtype)
    native.launch(address_of(compiled(kernel)), [x.data_ptr(), out.data_ptr(), len(x)])
    wanted = x.to(dtype)
    assert torch.equal(out.isnan(), wanted.isnan())
    kept = ~wanted.isnan()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out[kept].view(bits), wanted[kept].view(bits))


def test_every_piece_is_drawn_once_by_as_many_threads_as_torch_has() -> None:
    def kernel(record: int) -> None:
        thread = draw(record, native.THREAD)
        while True:
            piece = draw(record, native.PIECE)
            if piece >= load_long(record, COUNT):
                break
            put(load_long(record, OUT), piece, np.float32(1 + thread))

    address, threads = address_of(compiled(kernel)), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = torch.zeros(100_000)
            native.launch(address, [0, out.data_ptr(), len(out)])
            assert out.min() >= 1
            assert out.max() <= count
    finally:
        torch.set_num_threads(threads)


def test_what_was_compiled_is_kept_for_the_same_sources_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba itself looks at the kernel's own file, not at those that the kernel is built of."""
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))

    def hits(revision: str) -> int:
        monkeypatch.setattr(numba_parts, "_revision", lambda: revision)

        def kernel(record: int) -> None:
            put(load_long(record, OUT), 0, np.float32(1))

        count: int = compiled(kernel).cache_hits
        return count

    assert [hits("old"), hits("old"), hits("new"), hits("new"), hits("old")] == [0, 1, 0, 1, 1]


def test_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.usable(torch.bfloat16)
    assert not native.usable(torch.float16)
    monkeypatch.setitem(
        sys.modules, "numba", None
    )  # so that its import fails, as it does beside a NumPy too new for it
    native._parallel.cache_clear()
    try:
        assert not native.usable(torch.float32)
    finally:
        native._parallel.cache_clear()
