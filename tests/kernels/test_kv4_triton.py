"""The kernels over packed KV without a GPU: interpreted, and compiled for one that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexbatch.kernels import kv4_triton
from flexbatch.kernels.paged_triton import tile_for
from flexbatch.policy.footprint import kv_area_bytes
from tests.kernels.test_paged_triton import ROOT, TURING_SHARED, compiled


def test_in_the_interpreter() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted_kv4.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(("element", "dim", "longest"), [("fp16", 128, 1000), ("bf16", 64, 1), ("fp16", 80, 1)])
def test_attention_compiles_and_fits(
    element: str, dim: int, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = tile_for(longest=longest, group=4, dim=dim, page_tokens=64, dtype=torch.float16)
    types = dict.fromkeys(("out", "q", "means", "turns"), f"*{element}") | {"layer": "*u8", "records": "*i32"}
    types |= dict.fromkeys(("logs", "partial", "highest_of", "total_of"), "*fp32")
    types |= dict.fromkeys(("first_keys", "first_values"), "*fp32")
    types |= {"scale": "fp32", "record_stride": "i32", "page_stride": "i32"}
    constants = {"HEADS": 32, "GROUP": 4, **kv4_triton.packed_constants(dim), "PAGE": 64, "TURNS": True, "WINDOW": 0}
    constants["AREA"] = kv_area_bytes(64, dim)
    constants |= {"PARTITION": 512, "SPLIT": longest == 1, "ROWS": tile.rows, "KEYS": tile.keys}
    kernel = compiled(kv4_triton._attend_kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    assert kernel.metadata.shared <= TURING_SHARED
    assert "mma.sync" in kernel.asm["ptx"]


def test_store_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"layer": "*u8", "x": "*fp32", "feedbacks": "*fp32", "pages": "*i64", "offsets": "*i64"}
    types |= dict.fromkeys(("tokens", "page_stride", "x_token", "x_head"), "i32")
    constants = {"GROUPS": 2, "HALF": 32, "WIDTH": 32, "ROW": 72, "PLACE": 1, "ROWS": 16}
    constants["AREA"] = kv_area_bytes(64, 128)
    assert compiled(kv4_triton._store_kernel, types, constants, num_warps=4).asm["cubin"]
