"""Compiled kernels of a CPU against torch's operations, in turn, on the same operands.

    python benchmarks/cpu_kernels.py [--dtype bfloat16] [--rounds 30] [--output FILE]

Attention of decoding rows over pages of 64 tokens (one page a row, 512 rows), for several numbers of heads and widths;
RMS norm, gated SiLU and rotation of 256 rows of SmolLM2's shapes. Medians in microseconds: of a page and head of keys
for attention, of a call for the others; ``ratio`` is torch's time over ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexbatch.kernels import native
from flexbatch.kernels.activations import gated
from flexbatch.kernels.attention import Span, attend, prepare
from flexbatch.kernels.norms import rms_norm
from flexbatch.kernels.rotary import apply_rotary

_PAGE, _PAGES, _ROWS = 64, 512, 256
_HEADS = ((9, 3, 64), (32, 8, 64), (12, 2, 128), (8, 8, 128))


def nothing(dtype: torch.dtype) -> bool:  # noqa: ARG001  stands in for another
    """What ``native.usable`` says where no kernel can be compiled."""
    return False


def compared(make: Callable[[], Callable[[], object]], rounds: int, share: int = 1) -> dict[str, float]:
    """Medians of what ``make`` gives with and without compiled kernels, the two in turn; of a ``share`` of the work."""
    usable = native.usable
    works = {"compiled": make()}
    spent: dict[str, list[float]] = {"compiled": [], "torch": []}
    try:
        native.usable = nothing
        works["torch"] = make()
        for number in range(rounds + 3):
            for name, work in works.items():
                native.usable = usable if name == "compiled" else nothing
                started = time.perf_counter()
                work()
                if number >= 3:
                    spent[name].append(time.perf_counter() - started)
    finally:
        native.usable = usable
    middle = {name: 1e6 * statistics.median(each) / share for name, each in spent.items()}
    return {**middle, "ratio": middle["torch"] / middle["compiled"]}


def attention(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """By heads, heads of keys, and their width."""
    found = {}
    for heads, kv_heads, dim in _HEADS:
        pool = torch.randn(_PAGES, kv_heads, 2, _PAGE, dim).to(dtype)
        q = torch.randn(_PAGES, heads, dim).to(dtype)
        k = torch.randn(_PAGES, kv_heads, dim).to(dtype)
        spans = [Span(row, 1, _PAGE - 1, [row]) for row in range(_PAGES)]

        def make(pool: torch.Tensor = pool, q: torch.Tensor = q, k: torch.Tensor = k) -> Callable[[], object]:
            batch = prepare(spans, _PAGE, None, dtype)  # noqa: B023  called at once
            return lambda: attend(batch, pool, q, k, k, q.shape[2] ** -0.5)

        found[f"{heads}/{kv_heads}x{dim}"] = compared(make, rounds, _PAGES * kv_heads)
    return found


def rows(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """What lies between products."""
    x, weight = torch.randn(_ROWS, 576).to(dtype), torch.rand(576).to(dtype)
    gate_up, q = torch.randn(_ROWS, 3072).to(dtype), torch.randn(_ROWS, 15, 64).to(dtype)
    cos, sin = torch.rand(2, _ROWS, 32)
    works: dict[str, Callable[[], object]] = {
        "rms_norm": lambda: rms_norm(x, weight, 1e-5),
        "gated_silu": lambda: gated("silu", gate_up),
        "rotation": lambda: apply_rotary(q[:, :12], cos, sin),
    }
    return {name: compared(lambda work=work: work, rounds) for name, work in works.items()}  # type: ignore[misc]


def main() -> None:
    """Measure, and print or write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    with torch.inference_mode():
        measured = {"attention": attention(dtype, options.rounds), "rows": rows(dtype, options.rounds)}
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": options.dtype, **measured}
    text = json.dumps(report, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
