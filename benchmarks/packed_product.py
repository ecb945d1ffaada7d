"""Rates of CPU products with 4-bit weights by rows, as a table and benchmarks/results/packed_product.json.

python benchmarks/packed_product.py

Rates are billions of weights a second, of products over several weights that together do not fit the cache; beside ours
stand the 16-bit path (fp16 storage, fp32 products) and, for comparison only, torch's packed bf16 kernel, whose error is
above the bound of 1e-3 that ours has to keep.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.compression.groups import Packed, dequantize, unpack_codes
from flexbatch.compression.quantize import quantize
from flexbatch.kernels.linear import linear

RESULTS = Path(__file__).resolve().parent / "results" / "packed_product.json"
ROWS = (1, 4, 16, 64, 256, 1024)
OUT, IN, WEIGHTS = 2048, 2048, 16  # 67 million weights: 30 MB in 4 bits


def bf16_kernel(weights: list[Packed]) -> list[Callable[[Tensor], Tensor]]:
    """Torch's kernel for bf16 inputs, with the weights in the order that it wants."""
    products: list[Callable[[Tensor], Tensor]] = []
    for weight in weights:
        assert weight.minimums is not None
        codes = unpack_codes(weight.codes, weight.shape[1]).int()
        ordered = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        middle = weight.minimums.float() + 8 * weight.scales.float()
        pairs = torch.stack([weight.scales.float(), middle], -1).transpose(0, 1).contiguous().bfloat16()

        def product(x: Tensor, ordered: Tensor = ordered, pairs: Tensor = pairs) -> Tensor:
            return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), ordered, 64, pairs).float()

        products.append(product)
    return products


def rate(products: list[Callable[[Tensor], Tensor]], x: Tensor, budget: float) -> float:
    """The best of several rounds over all products, at least two and at most ``budget`` seconds of them."""
    best, spent, rounds = float("inf"), 0.0, 0
    while rounds < 2 or (spent < budget and rounds < 20):
        start = time.perf_counter()
        for product in products:
            product(x)
        elapsed = time.perf_counter() - start
        best, spent, rounds = min(best, elapsed), spent + elapsed, rounds + 1
    return len(products) * OUT * IN / best


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=0.4, help="seconds for each figure")
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = [quantize(torch.randn(OUT, IN) * 0.02, method="minmax") for _ in range(WEIGHTS)]
    halves = [dequantize(weight, torch.float16) for weight in weights]
    ways: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "4 bit": [partial(linear, parts=[weight]) for weight in weights],
    }
    ways["16 bit"] = [partial(linear, parts=[half]) for half in halves]
    ways["torch bf16 (too inexact)"] = bf16_kernel(weights)
    table: dict[str, dict[int, float]] = {}
    errors: dict[str, float] = {}
    exact = dequantize(weights[0])
    for name, products in ways.items():
        sample = torch.randn(16, IN).half().float()
        expected = sample @ exact.t()
        errors[name] = float((products[0](sample) - expected).norm() / expected.norm())
        table[name] = {rows: rate(products, torch.randn(rows, IN), options.budget) for rows in ROWS}
        print(f"{name:26s}", *(f"{value / 1e9:7.3f}" for value in table[name].values()), f"  error {errors[name]:.1e}")
    result = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights_per_s": table,
        "frobenius_error": errors,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
