"""What a 4-bit KV cache costs in perplexity, as a table and benchmarks/results/accuracy_kv4.json.

python -m benchmarks.accuracy_kv4                                    the demonstration model
python -m benchmarks.accuracy_kv4 --smollm2 FOLDER --texts FOLDER    SmolLM2 (as for accuracy_4bit.py)

Models are run by transformers, with attention that reads every key and value, the token's own included, from 4 bits:
what the engine does, in the basis that it finds for the model (from the texts that come with the package). Rows are the
16-bit weights and 4-bit ones (``search``), each with the cache in 16 bits, in 4 bits, and in 4 bits without the basis.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from benchmarks.accuracy_4bit import DEMO, TOKENS, Subject, markdown
from flexbatch.compression.groups import dequantize
from flexbatch.compression.quantize import quantize
from flexbatch.kernels.kv4 import pack_rows, unpack_rows
from flexbatch.kernels.kv4_basis import Basis, BasisFinder, turned
from flexbatch.policy.footprint import CALIBRATION_TOKENS

WEIGHTS = ("16 bit", "search")
RESULTS = Path(__file__).resolve().parent / "results" / "accuracy_kv4.json"
Attention = Callable[..., tuple[Tensor, None]]


def plain(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Queries [1, heads, T, D], k and v [1, kv_heads, T, D] -> [1, T, heads, D]."""
    attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return attended.transpose(1, 2).contiguous()


def observing(finders: Sequence[BasisFinder]) -> Attention:
    """Attention that shows ``finders`` what it sees."""

    def attend(
        of: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        finders[of.layer_idx].add(*(x[0].transpose(0, 1) for x in (q, k, v)))
        return plain(q, k, v, scaling), None

    return attend


def packed(bases: Sequence[Basis], turns: Tensor) -> Attention:
    """Attention over keys and values that were packed in ``bases``."""

    def attend(
        of: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        basis, positions, dim = bases[of.layer_idx], torch.arange(k.shape[2]), k.shape[3]
        first = (positions == 0).view(-1, 1, 1)
        keys, values = k[0].transpose(0, 1), v[0].transpose(0, 1)
        keys = unpack_rows(pack_rows(basis.stored_keys(keys, positions, turns)), dim) + first * basis.first_keys
        keys = torch.einsum("lkd,ked->lke", keys, basis.queries) + turned(basis.means, turns[positions])
        values = unpack_rows(pack_rows(basis.stored_values(values, positions)), dim) + first * basis.first_values
        values = values @ basis.values.t()
        return plain(q, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scaling), None

    return attend


def rotary(subject: Subject, length: int) -> Tensor:
    """Cosines, then sines of the positions below ``length``, as the model's own embedding has them."""
    cos, sin = subject.model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], 1)


@torch.no_grad()
def found(subject: Subject) -> list[Basis]:
    """The basis of every layer of the model as it is."""
    finders = [BasisFinder() for _ in subject.model.model.layers]
    attend_as(subject, observing(finders))
    text = resources.files("flexbatch").joinpath("assets/calibration.txt").read_text(encoding="utf-8")
    for part in text.strip().split("\n----\n"):
        subject.model(subject.encode(part)[:, :CALIBRATION_TOKENS], use_cache=False)
    return [finder.find(rotary(subject, CALIBRATION_TOKENS)) for finder in finders]


def attend_as(subject: Subject, attention: Attention) -> None:
    """Let the model use ``attention``."""
    AttentionInterface.register("kv4", attention)
    subject.model.set_attn_implementation("kv4")


def measure(subject: Subject, weights: Sequence[str]) -> dict[str, dict[str, float]]:
    """The rows of one model's table for ``weights``: by setting, the perplexity of each test."""
    rows: dict[str, dict[str, float]] = {}
    config = subject.model.config
    turns = rotary(subject, TOKENS)
    shape = (config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    for name in weights:
        if name == "search":
            subject.put(lambda weight: dequantize(quantize(weight)))
        subject.model.set_attn_implementation("sdpa")
        rows[name] = subject.perplexities()
        bases = {
            "": found(subject),
            ", without the basis": [Basis.plain(*shape) for _ in range(config.num_hidden_layers)],
        }
        for title, own in bases.items():
            attend_as(subject, packed(own, turns))
            rows[f"{name}, KV 4 bit{title}"] = subject.perplexities()
        for title, row in rows.items():
            print(f"{title:40s}", *(f"{value:8.3f}" for value in row.values()), flush=True)
    return rows


def main() -> None:
    """Measure, and add the tables to those written before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, action="append", help="default: both")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    weights = options.weights or WEIGHTS
    if options.smollm2 is not None and options.texts is not None:
        subject = Subject(options.smollm2)
        places = {
            "Emma": ("austen-emma", 2000),
            "Emma, later": ("austen-emma", 300_000),
            "Alice": ("carroll-alice", 20_000),
        }
        for test, (book, start) in places.items():
            text = (options.texts / f"{book}.txt").read_text(encoding="utf-8")[start : start + 8 * TOKENS]
            subject.tests[test] = [subject.encode(text)[:, :TOKENS]]
        name, rows = "SmolLM2-135M-Instruct", measure(subject, weights)
    else:
        subject = Subject(DEMO)
        torch.manual_seed(0)
        start_ids = torch.tensor([[subject.model.config.bos_token_id]])
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 255, "attention_mask": torch.ones_like(start_ids)}
        subject.tests = {"own samples": [subject.model.generate(start_ids, **settings) for _ in range(8)]}
        name, rows = "stories15m", measure(subject, weights)
    tables: dict[str, dict[str, dict[str, float]]] = {}
    if options.output.exists():
        tables = json.loads(options.output.read_text(encoding="utf-8"))
    tables[name] = tables.get(name, {}) | rows
    options.output.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    print(markdown(tables))


if __name__ == "__main__":
    main()
