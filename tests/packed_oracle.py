"""transformers with keys and values that go through 4 bits before attention sees them: the oracle of ``kv_bits=4``.

Every forward packs and unpacks the whole cache, which transformers itself keeps in full precision.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from flexbatch.kernels.kv4 import pack_rows, rotate, rotation, unpack_rows
from tests.oracle import Row, generate_row
from tests.tiny import FAMILIES, load_oracle


def through_four_bits(x: Tensor, *, key: bool) -> Tensor:
    """[..., D] packed and unpacked; keys are rotated for that."""
    dim = x.shape[-1]
    if not key:
        return unpack_rows(pack_rows(x), dim)
    return unpack_rows(pack_rows(rotate(x)), dim) @ rotation(dim).t()


@contextmanager
def packed_attention() -> Iterator[None]:
    """Within it the eager attention of transformers reads keys and values of 4 bits."""
    patches = []
    for family in FAMILIES:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        plain: Callable[..., Any] = module.eager_attention_forward

        def packed(of: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, plain: Any = plain, **named: Any) -> Any:
            return plain(of, q, through_four_bits(k, key=True), through_four_bits(v, key=False), *rest, **named)

        patches.append(mock.patch.object(module, "eager_attention_forward", packed))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def generate_packed(path: Path, rows: Sequence[tuple[tuple[int, ...], int]]) -> list[Row]:
    """Generate each row by itself, greedily, with a cache of 4 bits."""
    model = load_oracle(path)
    with packed_attention():
        return [generate_row(model, prompt, new) for prompt, new in rows]
