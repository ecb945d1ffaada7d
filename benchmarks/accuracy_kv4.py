"""What a 4-bit KV cache costs in perplexity, as a table and benchmarks/results/accuracy_kv4.json.

python -m benchmarks.accuracy_kv4                                    the demonstration model
python -m benchmarks.accuracy_kv4 --smollm2 FOLDER --texts FOLDER    SmolLM2 (as for accuracy_4bit.py)
... --books                                        1024 tokens of every book, whose mean says more than any of them

Models are run by transformers, with attention that reads every key and value, the token's own included, from 4 bits:
what the engine does, in the basis that it finds for the model (from the texts that come with the package). Rows are
16-bit weights and 4-bit ones (``search``, ``calibrated``), each with the cache in 16 bits, in 4 bits, and in 4 bits
without the basis.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from benchmarks.accuracy_4bit import TOKENS, Subject, keep, quantize_linears, show, subject_of
from flexbatch.kernels.kv4 import pack_rows, unpack_rows
from flexbatch.kernels.kv4_basis import Basis, turned
from flexbatch.kernels.kv4_finder import BasisFinder
from flexbatch.policy.footprint import CALIBRATION_TOKENS

WEIGHTS = ("16 bit", "search", "calibrated")
KV = (", KV 4 bit", ", KV 4 bit, without the basis")
RESULTS = Path(__file__).resolve().parent / "results" / "accuracy_kv4.json"
BOOK_START = 120_000  # characters into a book, if it is long enough
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
        keys = unpack_rows(pack_rows(basis.stored_keys(keys, positions, turns), basis.key_feedback), dim)
        keys = torch.einsum("lkd,ked->lke", keys + first * basis.first_keys, basis.queries)
        keys = keys + turned(basis.means, turns[positions])
        values = unpack_rows(pack_rows(basis.stored_values(values, positions), basis.value_feedback), dim)
        values = basis.attended(values + first * basis.first_values)
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
    turns, layers = rotary(subject, CALIBRATION_TOKENS), subject.model.model.layers
    dim = subject.model.config.hidden_size // subject.model.config.num_attention_heads
    return [
        finder.find(turns, layer.self_attn.o_proj.weight.data.unflatten(1, (-1, dim)))
        for finder, layer in zip(finders, layers, strict=True)
    ]


def attend_as(subject: Subject, attention: Attention) -> None:
    """Let the model use ``attention``."""
    AttentionInterface.register("kv4", attention)
    subject.model.set_attn_implementation("kv4")


def variants(subject: Subject) -> Iterator[tuple[str, list[Basis]]]:
    """Titles of the ways to pack KV of the model as it is, and the bases of its layers."""
    config = subject.model.config
    shape = (config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    yield KV[0], found(subject)
    yield KV[1], [Basis.plain(*shape) for _ in range(config.num_hidden_layers)]


def every_book(subject: Subject, texts: Path) -> dict[str, list[Tensor]]:
    """1024 tokens of each book, from some way into it; of books that are long enough."""
    found = {}
    for path in sorted(texts.glob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        start = BOOK_START if len(text) > BOOK_START + 8 * TOKENS else 2000
        ids = subject.encode(text[start : start + 8 * TOKENS])[:, :TOKENS]
        if ids.shape[1] == TOKENS:
            found[path.stem] = [ids]
    return found


def say_costs(rows: dict[str, dict[str, float]]) -> None:
    """What KV in 4 bit costs beside the same weights: percent, the mean of all tests and its standard error."""
    for way, row in rows.items():
        base = next((rows[name] for name in WEIGHTS if way.startswith(name + ",")), None)
        if base is not None:
            costs = [100 * (row[test] / base[test] - 1) for test in row]
            error = statistics.stdev(costs) / len(costs) ** 0.5 if len(costs) > 1 else 0.0
            print(f"{way}: {statistics.mean(costs):+.2f}% (standard error {error:.2f}, {len(costs)} texts)")


def main() -> None:
    """Measure, and add the tables to those written before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, nargs="+", default=WEIGHTS)
    parser.add_argument("--books", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.books and options.texts is None:
        parser.error("--books: needs --smollm2 and --texts")
    subject = subject_of(options.smollm2, options.texts)
    if options.books:
        subject.name += ", books"
        subject.tests = every_book(subject, options.texts)
    turns = rotary(subject, TOKENS)
    rows: dict[str, dict[str, float]] = {}
    for way in options.weights:
        subject.model.set_attn_implementation("sdpa")
        quantize_linears(subject, way)
        rows[way] = subject.perplexities()
        show(way, rows[way])
        for title, bases in variants(subject):
            attend_as(subject, packed(bases, turns))
            rows[way + title] = subject.perplexities()
            show(way + title, rows[way + title])
    say_costs(rows)
    keep(options.output, subject.name, rows, [way + title for way in WEIGHTS for title in ("", *KV)])


if __name__ == "__main__":
    main()
