"""What a 4-bit KV cache costs in perplexity, as a table and benchmarks/results/accuracy_kv4.json.

python -m benchmarks.accuracy_kv4                                    the demonstration model
python -m benchmarks.accuracy_kv4 --smollm2 FOLDER --texts FOLDER    SmolLM2 (as for accuracy_4bit.py)
... --books                                        1024 tokens of every book, whose mean says more than any of them

Models are run by transformers, with attention that reads a token's own key and value as they are, those of the nearest
before it in 6 bits and all others in 4: what the engine does, in the basis that it finds for the model (from the texts
that come with the package). ``--draws``: with noise of 1e-6 in the embedding, as often: numbers at the border of two
codes fall to the other one, and the spread says what a single figure is worth. Rows are
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
from flexbatch.kernels.kv4 import pack_rows, scales_of, unpack_rows
from flexbatch.kernels.kv4_basis import Basis, turned
from flexbatch.kernels.kv4_finder import BasisFinder
from flexbatch.kernels.kv4_near import fine_of, finer
from flexbatch.policy.footprint import CALIBRATION_TOKENS, KV_NEAR

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


def in_bits(exact: Tensor, feedback: Tensor) -> list[Tensor]:
    """Numbers [T, kv_heads, D] as they are packed: in 4 bits, and in 6."""
    rows, dim = pack_rows(exact, feedback), exact.shape[2]
    coarse, scales = unpack_rows(rows, dim), scales_of(rows, dim)
    return [coarse, fine_of(finer(exact, coarse, scales), coarse, scales)]


def packed(bases: Sequence[Basis], turns: Tensor) -> Attention:
    """Attention over keys and values packed in ``bases``: a token's own as they are, the nearest in 6 bits."""

    def attend(
        of: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        basis, positions = bases[of.layer_idx], torch.arange(k.shape[2])
        first = (positions == 0).view(-1, 1, 1)
        keys, values = k[0].transpose(0, 1), v[0].transpose(0, 1)
        means = turned(basis.means, turns[positions])
        all_keys = [
            torch.einsum("lkd,ked->lke", numbers + first * basis.first_keys, basis.queries) + means
            for numbers in in_bits(basis.stored_keys(keys, positions, turns), basis.key_feedback)
        ]
        all_values = [
            basis.attended(numbers + first * basis.first_values)
            for numbers in in_bits(basis.stored_values(values, positions), basis.value_feedback)
        ]
        # All three ways stand side by side; the mask leaves each query one of each token.
        distance = positions.unsqueeze(1) - positions
        way = ((distance >= 0) & (distance <= KV_NEAR)).long() + (distance == 0).long()
        seen = torch.cat([(way == each) & (distance >= 0) for each in range(3)], 1)
        k, v = (torch.cat(ways).transpose(0, 1)[None] for ways in ([*all_keys, keys], [*all_values, values]))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True)
        return attended.transpose(1, 2).contiguous(), None

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


@torch.no_grad()
def drawn(subject: Subject, draws: int) -> list[dict[str, float]]:
    """Perplexities with noise in the embedding, so often."""
    table = subject.model.get_input_embeddings().weight.data
    exact, found = table.clone(), []
    for seed in range(draws):
        table.mul_(1 + 1e-6 * torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)))
        found.append(subject.perplexities())
        table.copy_(exact)
    return found


def say_draws(way: str, base: dict[str, float], found: list[dict[str, float]]) -> None:
    """The mean cost of each test over some draws, and their deviation: percent."""
    for test, without in base.items():
        costs = [100 * (each[test] / without - 1) for each in found]
        deviation = statistics.stdev(costs) if len(costs) > 1 else 0.0
        print(f"{way}, {test}: {statistics.mean(costs):+.2f}%, deviation {deviation:.2f} of {len(costs)} draws")


def main() -> None:
    """Measure, and add the tables to those written before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, nargs="+", default=WEIGHTS)
    parser.add_argument("--books", action="store_true")
    parser.add_argument("--draws", type=int, default=0)
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
            if options.draws:
                say_draws(way + title, rows[way], drawn(subject, options.draws))
    say_costs(rows)
    keep(options.output, subject.name, rows, [way + title for way in WEIGHTS for title in ("", *KV)])


if __name__ == "__main__":
    main()
