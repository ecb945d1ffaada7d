"""The Triton kernels for 4 bits without a GPU: interpreted in a process of its own, and compiled for an A100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexbatch.kernels import packed_triton
from tests.kernels.test_paged_triton import TURING_SHARED, compiled

ROOT = Path(__file__).resolve().parents[2]


def test_in_the_interpreter() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted_packed.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(("zeros", "middle"), [(False, 0), (True, 0), (True, 8)])
@pytest.mark.parametrize(("rows", "outputs"), [(16, 32), (128, 64)])
def test_product_compiles_and_fits(
    rows: int, outputs: int, zeros: bool, middle: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"out": "*fp16", "x": "*fp16", "codes": "*u8", "scales": "*fp16", "offsets": "*u8" if zeros else "*fp16"}
    types |= {"rows": "i32", "outputs": "i32", "x_row": "i32"}
    constants = {"IN": 4096, "GROUP": 64, "GROUPS": 64, "PER_SPLIT": 64, "INTEGER_ZEROS": zeros, "MIDDLE": middle}
    constants |= {"ROWS": rows, "OUTPUTS": outputs}
    kernel = compiled(packed_triton._product_kernel, types, constants, num_warps=4, num_stages=2)
    assert kernel.metadata.shared <= TURING_SHARED
    assert "mma.sync" in kernel.asm["ptx"], "tensor cores"
