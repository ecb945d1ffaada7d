"""The LoRA kernels in Triton's interpreter, on the CPU. Run by ``test_lora``, in a process of its own.

The interpreter has to be chosen before triton is imported: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime import interpreter  # type: ignore[import-untyped]

from flexbatch.kernels import lora
from flexbatch.kernels.lora import add_paged, add_paged_reference, group_rows
from tests.kernels.lora_cases import build


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lora.BACKENDS, "cpu", "flexbatch.kernels.lora_triton")
    patch: Callable[..., None] = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        # As in ``interpreted``: loop bounds are arrays of one number, which NumPy takes by __index__ only.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)


@pytest.mark.parametrize("seed", range(8))
def test_any_mix(seed: int) -> None:
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float16])
    into, out = rng.choice([20, 80, 96]), rng.choice([12, 100, 131])
    case = build(rng, into, out, dtype=dtype, transposed=seed % 2 == 1, rows=rng.choice([6, 50]))
    paged = case.paged(rng.choice([16, 100, 1024]))
    result, reference = (case.y.clone(memory_format=torch.preserve_format) for _ in range(2))
    add_paged(result, case.x, case.groups, paged)
    add_paged_reference(reference, case.x, case.groups, paged)
    near = 1e-4 if dtype == torch.float32 else 3e-2
    assert torch.allclose(result.double(), case.dense(), atol=near, rtol=near)
    assert torch.allclose(result, reference, atol=near, rtol=near)
    assert torch.equal(result[case.base_rows], case.y[case.base_rows])


def test_no_rows() -> None:
    case: Any = build(random.Random(4), 16, 16)
    y = case.y.clone()
    add_paged(y, case.x, group_rows([]), case.paged(16))
    assert torch.equal(y, case.y)
