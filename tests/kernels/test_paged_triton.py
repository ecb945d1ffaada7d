"""The Triton kernels without a GPU: interpreted against dense products, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from flexbatch.kernels import paged_triton

ROOT = Path(__file__).resolve().parents[2]
TURING_SHARED = 64 * 1024  # bytes that a program may have where it may have least


def test_in_the_interpreter() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """Compile a kernel for an A100; what ``types`` does not name is a pointer's element type or a constant."""
    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    divisible = {
        (names.index(name),): [["tt.divisibility", 16]] for name in types if name.endswith(("stride", "q", "layer"))
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options | {"enable_fp_fusion": True})


@pytest.mark.parametrize(
    ("element", "dtype", "dim", "longest"),
    [("fp16", torch.float16, 128, 1000), ("bf16", torch.bfloat16, 80, 1), ("fp32", torch.float32, 64, 1)],
)
def test_attention_compiles_and_fits(
    element: str, dtype: torch.dtype, dim: int, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = paged_triton.tile_for(longest=longest, group=4, dim=dim, page_tokens=64, dtype=dtype)
    types = dict.fromkeys(("out", "q", "layer"), f"*{element}")
    types |= dict.fromkeys(("partial", "highest_of", "total_of"), "*fp32") | {"records": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("record_stride", "q_token", "q_head", "page_stride"), "i32")
    constants = {"HEADS": 32, "GROUP": 4, "DIM": dim, "WIDTH": 1 << (dim - 1).bit_length(), "PAGE": 64, "WINDOW": 0}
    constants |= {"PARTITION": 512, "SPLIT": longest == 1, "ROWS": tile.rows, "KEYS": tile.keys}
    kernel = compiled(paged_triton._attend_kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    assert kernel.metadata.shared <= TURING_SHARED
    assert ("mma.sync" in kernel.asm["ptx"]) == (dtype != torch.float32), "tensor cores, but no rounding to TF32"


def test_merge_and_store_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"out": "*bf16", "records": "*i32", "record_stride": "i32"}
    types |= dict.fromkeys(("partial", "highest_of", "total_of", "logs"), "*fp32")
    for logs in (False, True):
        constants = {"HEADS": 32, "DIM": 80, "WIDTH": 128, "LOGS": logs, "WINDOW": 100, "PARTITION": 512}
        assert compiled(paged_triton._merge_kernel, types, constants, num_warps=1).asm["cubin"]
    types = dict.fromkeys(("layer", "k", "v"), "*fp16") | {"pages": "*i64", "offsets": "*i64"}
    types |= dict.fromkeys(("page_stride", "k_token", "k_head", "v_token", "v_head"), "i32")
    constants = {"KV_HEADS": 8, "DIM": 128, "PAGE": 64, "BLOCK": 1024}
    assert compiled(paged_triton._store_kernel, types, constants, num_warps=4).asm["cubin"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [8, 80, 128, 256])
@pytest.mark.parametrize("page_tokens", [4, 16, 48, 64])
@pytest.mark.parametrize(("group", "longest"), [(1, 1), (7, 3), (96, 500)])
def test_tiles_are_what_the_kernels_take(
    dtype: torch.dtype, dim: int, page_tokens: int, group: int, longest: int
) -> None:
    tile = paged_triton.tile_for(longest=longest, group=group, dim=dim, page_tokens=page_tokens, dtype=dtype)
    for number in (tile.rows, tile.keys):
        assert number >= 16
        assert number & (number - 1) == 0
    assert tile.rows >= group
    assert page_tokens not in (16, 64) or page_tokens % tile.keys == 0
